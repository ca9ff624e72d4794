"""Stage 4: the joint transformer, trained by rectified flow on frozen text encoders and latents.

The recipe, and where each part comes from:

* velocity target ``n - x`` at logit-normal noise levels under shift 3 (SD3, arXiv 2403.03206, section 3);
* every text encoder dropped at random by zeroing its rows, 10 % empty captions (same, section 5.2 and appendix B);
* low resolution and few objects first: single objects on 32 px canvases (64 tokens), exactly two objects on 48 px (144
  tokens), where a relation or a count is most of what there is to learn, then whole scenes (256 tokens);
* hard negatives: part of a batch is also read with the opposite of what its caption states, and must come out worse
  that way (below `CONTRAST`); without it, relations and counts cost more steps than a CPU has;
* the pooled text is zero throughout, so all text acts through the joint attention;
* Muon for the matrices inside the blocks, AdamW for the rest.

Pictures and captions are all it learns from. ``--align`` adds what `training.align` describes, as an ablation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import align
from training.features import load_trained_encoder
from training.loop import AverageOfWeights, Stage, constant_then_linear, low_precision, run
from training.measure import Measurements
from training.parser import images_of, load_trained_parser
from training.pool import Pool
from training.session import Session
from training.text import Negative, draw_captions, draw_negatives, hard_negatives, load_trained_text
from training.transformer import (
    POOLS,
    SHIFT,
    AlignedTransformer,
    Encoded,
    ExplicitJointAttention,
    TextEncoders,
    draw_kept,
    encode_pool,
)
from training.vae import DOWN, load_trained_vae

EMPTY = 0.1
CONTRAST, SHARPNESS = 0.1, 100.0
"""Weight of the term ``softplus(-SHARPNESS * d)``, d the excess of a picture's squared error with the wrong caption
over that with the right one, at the same noise. What both have in common cancels in d, so its gradient is about the
wrong word alone; from d of about 3 / SHARPNESS on it vanishes. Contrastive flow matching (arXiv 2506.05350) contrasts
with another picture's velocity instead, without a bound."""
DROP = {"clip_l": 0.2, "clip_g": 0.2, "t5": 0.3}
"""Probability that an encoder's rows are zeroed, independently of the others."""


@dataclass(frozen=True)
class Phase:
    """One part of the curriculum.

    Attributes:
        batch: pictures of a step.
        wrong: how many of them are read with a wrong caption as well.
    """

    pool: str
    steps: int
    batch: int
    wrong: int = 0


CURRICULUM = (
    Phase("single", 800, 96),
    Phase("pair", 1000, 64),
    Phase("scenes", 1251, 48),
    Phase("pair", 250, 32, wrong=32),
    Phase("scenes", 1325, 24, wrong=24),
    Phase("scenes", 1175, 36, wrong=12),
)
"""No phase has wrong captions before objects are drawn: a relation needs two of them."""


def fitted(curriculum: tuple[Phase, ...], steps: int | None) -> tuple[Phase, ...]:
    """A curriculum of `steps` steps: fewer than it has shrink every phase alike, more lengthen the last."""
    lengths = [phase.steps for phase in curriculum]
    total = sum(lengths)
    if steps is not None and steps < total:
        ends = [round(steps * sum(lengths[: k + 1]) / total) for k in range(len(lengths))]
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    elif steps is not None:
        lengths[-1] += steps - total
    return tuple(replace(phase, steps=n) for phase, n in zip(curriculum, lengths, strict=True))


def phase_at(step: int, curriculum: tuple[Phase, ...]) -> Phase:
    """The phase that a step belongs to; steps past the end stay in the last."""
    for phase in curriculum:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return curriculum[-1]


def draw_sigmas(n: int) -> Tensor:
    """Noise levels [n] in (0, 1): logit-normal(0, 1), then shift 3 (arXiv 2403.03206, eqs. 19 and 23)."""
    u = torch.sigmoid(torch.randn(n))
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def optimizers(model: nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside the blocks (not those of the modulation), AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks" in name and parameter.ndim == 2 and "norm1" not in name
        (matrices if inside else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=adam_rate, weight_decay=0.0, betas=(0.9, 0.98))]


def alignment_target(session: Session) -> align.Target:
    """What the heads are compared with: the parser's reading, or features of the stage ssl."""
    if session.alignment.target == "labels":
        return align.reading(load_trained_parser(session.workdir).to(session.where), DOWN)
    return load_trained_encoder(session.workdir).to(session.where)


def draw_scenes(
    phase: Phase, data: Pool, negatives: Callable[[str], dict[str, list[Negative]]]
) -> tuple[Tensor, list[str], list[str]]:
    """Scenes of a step [batch], their captions, and wrong captions of the first of them.

    Args:
        negatives: name of a pool -> its `hard_negatives`; it reads every caption, so only where some are drawn.
    """
    drawn = draw_negatives(negatives(phase.pool), phase.wrong) if phase.wrong else []
    rows = [row for row, _, _ in drawn] + torch.randint(len(data), (phase.batch - phase.wrong,)).tolist()
    captions = [caption for _, caption, _ in drawn] + draw_captions(data, rows[phase.wrong :], EMPTY)
    return torch.tensor(rows), captions, [wrong for _, _, wrong in drawn]


def contrasted(error: Tensor, phase: Phase) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step, and what is logged of it.

    Args:
        error: mean squared error of the velocity [batch + wrong]; after the batch come its first pictures again, with
            the same noise and a wrong caption.
    """
    flow = error[: phase.batch].mean()
    numbers = {"flow": float(flow.detach())}
    if not phase.wrong:
        return flow, numbers
    excess = error[phase.batch :] - error[: phase.wrong]
    numbers["excess"] = float(excess.detach().mean())
    return flow + CONTRAST * F.softplus(-SHARPNESS * excess).mean(), numbers


def train_transformer(session: Session, folder: Path | None = None) -> bool:
    """Train the transformer into ``workdir/transformer``, or into another folder beside the same other stages."""
    where, alignment = session.where, session.alignment
    curriculum = fitted(CURRICULUM, session.steps)
    steps = sum(phase.steps for phase in curriculum)
    vae = load_trained_vae(session)
    clip, t5 = load_trained_text(session.workdir)
    encode = TextEncoders(clip.to(where), t5.to(where), where)

    @cache
    def encoded(split: str, name: str) -> Encoded:
        return encode_pool(session.pool(split, **POOLS[name]), f"{split}-{name}", session.workdir, vae, where)

    @cache
    def negatives(name: str) -> dict[str, list[Negative]]:
        return hard_negatives(encoded("train", name).data)

    target = alignment_target(session) if alignment.layers else None
    torch.manual_seed(session.seed)
    model = AlignedTransformer(alignment).to(where)
    model.transformer.set_attn_processor(ExplicitJointAttention())
    forward = torch.compile(model) if session.compiled else model
    average = AverageOfWeights(model, 0.999)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        phase = phase_at(step, curriculum)
        data = encoded("train", phase.pool)
        n = phase.wrong
        rows, captions, wrong = draw_scenes(phase, data.data, negatives)
        clean = data.clean(rows, where)
        kept = draw_kept(phase.batch, DROP)
        text = encode(captions + wrong, {name: torch.cat([one, one[:n]]) for name, one in kept.items()})
        sigma = draw_sigmas(phase.batch)
        sigma[:n] = 1 - 0.4 * torch.rand(n)
        noise = torch.randn(clean.shape)
        again = torch.cat([torch.arange(phase.batch), torch.arange(n)])
        clean, noise, sigma = clean[again], noise[again].to(where), sigma[again].to(where)
        with low_precision(where):
            velocity, said = forward(torch.lerp(clean, noise, sigma[:, None, None, None]), text, 1000 * sigma)
        flow, numbers = contrasted((velocity.float() - (noise - clean)).square().mean((1, 2, 3)), phase)
        if target is None:
            return flow, numbers
        aligned = alignment.loss([one[: phase.batch] for one in said], target(images_of(data.data, rows, where)))
        return flow + align.WEIGHT * aligned, numbers | {"align": float(aligned.detach())}

    measurements = Measurements(session, encode, lambda name: encoded("val", name))

    def evaluate(step: int) -> dict[str, float]:
        averaged = AlignedTransformer(alignment).to(where)
        average.copy_to(averaged)
        return measurements(averaged.eval().requires_grad_(False), phase_at(step - 1, curriculum).pool)

    stage = Stage(
        "transformer", steps, model, optimizers(model, 3e-3, 2e-3), loss,
        lambda step: constant_then_linear(step, steps, 200), evaluate, average=average, recipe={"align": session.align},
    )  # fmt: skip
    return run(stage, folder or session.workdir / "transformer", session)
