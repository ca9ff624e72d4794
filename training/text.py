"""Stage 2: the text encoders, trained before the transformer and then frozen, as SD3's were.

Two CLIP text towers of different depth learn against one small image tower (arXiv 2103.00020); the first pair is also
kept as ``scenes-clip``. A T5 encoder learns to restore captions whose words were hidden or exchanged, and no attention
mask hides the padding, just as the SD3 pipeline calls it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mmdit_probe.scenes.captions import KINDS, is_caption, opposites
from mmdit_probe.scenes.world import SIZE
from training.loop import Stage, low_precision, run, trained, warmup_cosine
from training.parser import images_of
from training.pool import Pool
from training.session import Session
from training.tokenizers import MASK, TEXT_LENGTH, clip_tokenizer, ids_of, t5_tokenizer

WIDTH = 64
"""Width of each CLIP text tower and of the shared space; T5 is twice as wide, so that both fit without padding."""

BATCH = 128
_KIND_WEIGHTS = {
    "colour": 4.0,
    "shape": 1.0,
    "texture": 0.5,
    "2d-spatial": 2.0,
    "numeracy": 1.5,
    "complex": 3.0,
    "list": 2.0,
}


def draw_captions(data: Pool, rows: list[int], empty: float = 0.0) -> list[str]:
    """One caption per scene, its kind drawn with torch's generator; a share ``empty`` of them is the empty caption."""
    if not rows:
        return []
    odds = torch.tensor([_KIND_WEIGHTS.get(kind, 0.0) for kind in KINDS])
    kinds = torch.multinomial(odds, len(rows), replacement=True).tolist()
    blank = (torch.rand(len(rows)) < empty).tolist()
    return ["" if b else data.captions[row][kind] for row, kind, b in zip(rows, kinds, blank, strict=True)]


Negative = tuple[int, str, str]
"""A scene, a caption of it, and the caption with one thing turned round."""

CHANGES = {"opposite_relation": 2.0, "wrong_count": 2.0, "swapped_colours": 1.0}
"""How often each change of a caption (`scenes.captions.opposites`) is drawn."""


def hard_negatives(data: Pool) -> dict[str, list[Negative]]:
    """Change -> every scene with a caption that it makes wrong.

    Nothing but captions is read. They are the hard negatives of NegCLIP (arXiv 2210.01936).
    """
    found: dict[str, list[Negative]] = {change: [] for change in CHANGES}
    for row, captions in enumerate(data.captions):
        for caption in dict.fromkeys(captions):
            if is_caption(caption):
                for change, wrong in opposites(caption).items():
                    found[change].append((row, caption, wrong))
    return {change: some for change, some in found.items() if some}


def draw_negatives(negatives: dict[str, list[Negative]], n: int) -> list[Negative]:
    """n of them, the change drawn by ``CHANGES``, then one of its scenes; by torch's generator."""
    changes = list(negatives)
    odds = torch.tensor([CHANGES[change] for change in changes])
    drawn = [changes[k] for k in torch.multinomial(odds, n, replacement=True).tolist()] if n else []
    return [negatives[change][int(torch.randint(len(negatives[change]), ()))] for change in drawn]


def clip_config(layers: int, pad: str) -> CLIPConfig:
    """A small CLIP for 64 px scenes; ``layers`` of the text tower."""
    tokens = clip_tokenizer(pad)
    text = {
        "vocab_size": len(tokens),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": WIDTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "projection_dim": WIDTH,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


class ClipPair(nn.Module):
    """One CLIP model and a second, deeper text tower that shares its image tower."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIPModel(clip_config(3, "<|endoftext|>"))
        second = CLIPTextConfig(**clip_config(4, "!").text_config.to_dict())
        self.second = CLIPTextModelWithProjection(second)
        # At these lengths the explicit softmax trains several times faster on a CPU than the fused kernel's backward.
        self.clip.set_attn_implementation("eager")
        self.second.set_attn_implementation("eager")

    def forward(self, images: Tensor, ids: Tensor, ids_second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors [B, 64] of images [B, 3, 64, 64] and of both text towers for ids [B, 24]."""
        pictures = self.clip.visual_projection(self.clip.vision_model(pixel_values=images).pooler_output)
        first = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        second = self.second(input_ids=ids_second).text_embeds
        return F.normalize(pictures, dim=-1), F.normalize(first, dim=-1), F.normalize(second, dim=-1)


def train_clip(session: Session) -> bool:
    """Train both CLIP text towers contrastively into ``workdir/clip``."""
    where, steps = session.where, session.steps or 1500
    data, val = session.pool("train"), session.pool("val")
    first, second = clip_tokenizer(), clip_tokenizer("!")
    torch.manual_seed(session.seed)
    pair = ClipPair().to(where)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))

    def similarity(images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        with low_precision(where):
            pictures, one, two = pair(images, ids_of(first, texts).to(where), ids_of(second, texts).to(where))
        scale = pair.clip.logit_scale.exp().clamp(max=100)
        return scale * pictures.float() @ one.float().T, scale * pictures.float() @ two.float().T

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(data), (BATCH,)).sort().values
        texts = draw_captions(data, rows.tolist())
        images = images_of(data, rows, where)
        same = torch.tensor([[a == b for b in texts] for a in texts], device=where).float()
        total = torch.zeros((), device=where)
        for logits in similarity(images, texts):
            for view in (logits, logits.T):
                total = total + F.cross_entropy(view, same / same.sum(1, keepdim=True)) / 4
        return total, {}

    def evaluate(step: int) -> dict[str, float]:
        n = min(256, len(val))
        images = images_of(val, torch.arange(n), where)
        texts = [row[KINDS.index("complex")] for row in val.captions[:n]]
        scores = similarity(images, texts)
        truth = torch.arange(n, device=where)
        return {f"retrieval_{k}": float((s.argmax(0) == truth).float().mean()) for k, s in enumerate(scores, start=1)}

    stage = Stage(
        "clip", steps, pair, [optimizer], loss, lambda step: warmup_cosine(step, steps, 150), evaluate,
        evaluate_every=500,
    )  # fmt: skip
    return run(stage, session.workdir / "clip", session)


def t5_config() -> T5Config:
    """A T5 encoder of width 128 with two layers."""
    return T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=2 * WIDTH,
        d_kv=32,
        d_ff=4 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )


class Restorer(nn.Module):
    """The T5 encoder and the head that names the word at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = T5EncoderModel(t5_config())
        self.head = nn.Linear(2 * WIDTH, len(t5_tokenizer()))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, 24, V] of ids [B, 24]; padding is seen like any token, as in the SD3 pipeline."""
        return self.head(self.encoder(input_ids=ids)[0])  # type: ignore[no-any-return]


def train_t5(session: Session) -> bool:
    """Train the T5 encoder into ``workdir/t5``: 20 % of the words hidden, 10 % exchanged, all positions restored."""
    where, steps = session.where, session.steps or 1500
    data, val = session.pool("train"), session.pool("val")
    tokens = t5_tokenizer()
    mask_id = tokens.convert_tokens_to_ids(MASK)
    torch.manual_seed(session.seed)
    model = Restorer().to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)

    def spoil(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = ids_of(tokens, texts)
        word = ids > mask_id
        draw = torch.rand(ids.shape)
        other = ids[word][torch.randint(int(word.sum()), ids.shape)]
        seen = torch.where(word & (draw < 0.2), mask_id, torch.where(word & (draw > 0.9), other, ids))
        return seen.to(where), ids.to(where), (word & (seen == mask_id)).to(where)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        seen, truth, hidden = spoil(draw_captions(data, torch.randint(len(data), (BATCH,)).tolist()))
        each = F.cross_entropy(model(seen).flatten(0, 1), truth.flatten(), reduction="none").view(truth.shape)
        each = each * (truth != 0)
        masked = each[hidden].mean()
        return each.sum() / (truth != 0).sum() + masked, {"masked": float(masked.detach())}

    def evaluate(step: int) -> dict[str, float]:
        seen, truth, hidden = spoil([row[KINDS.index("complex")] for row in val.captions[:256]])
        found = model(seen).argmax(-1)
        kept = (truth > mask_id) & (seen == truth)
        return {
            "masked_right": float((found == truth)[hidden].float().mean()),
            "kept_right": float((found == truth)[kept].float().mean()),
        }

    stage = Stage(
        "t5", steps, model, [optimizer], loss, lambda step: warmup_cosine(step, steps, 100), evaluate,
        evaluate_every=500,
    )  # fmt: skip
    return run(stage, session.workdir / "t5", session)


def load_trained_text(workdir: Path) -> tuple[ClipPair, T5EncoderModel]:
    """Both CLIP towers and the T5 encoder as trained in ``workdir``, frozen, in evaluation mode."""
    return trained(ClipPair(), workdir / "clip"), trained(Restorer(), workdir / "t5").encoder
