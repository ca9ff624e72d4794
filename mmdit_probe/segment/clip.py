"""CLIP, and patch features of other networks, as the CLIP-based methods need them; any transformers checkpoint.

    clip = DenseCLIP.open("scenes-clip")             # embedded, a folder, or a hub id; nothing is downloaded implicitly
    hidden = clip.hidden(image)                      # list of L + 1 tensors [1 + n, E], CLS first
    clip.text(["cat", "wet grass"])                  # [C, P], unit length

Written against the public parts of `CLIPModel` (layer_norm1, self_attn.{q,k,v,out}_proj, post_layernorm, ...): blocks
are run here step by step where a method changes them, no module is patched. Works with transformers 5 and later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe.errors import UserError

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "there is a {} in the scene.", "{}")
"""A short ensemble in place of the 80 ImageNet templates; the embedded CLIP takes the bare name."""


@dataclass(frozen=True)
class DenseCLIP:
    """A CLIP model, its tokenizer and its pixel statistics."""

    name: str
    model: Any
    tokenizer: Any
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @staticmethod
    @lru_cache(maxsize=2)
    def open(name: str) -> DenseCLIP:
        """Load by embedded name, folder or hub id (from the local cache; downloads only if the hub is reachable).

        Raises:
            UserError: not there, or not a CLIP model.
        """
        import transformers
        from transformers import AutoTokenizer, CLIPModel

        from mmdit_probe import assets

        place = str(assets.path(name)) if name in assets.names() else name
        if name in assets.names():
            transformers.utils.logging.disable_progress_bar()  # a bar for one small local file
        try:
            model = CLIPModel.from_pretrained(place, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the CLIP {name!r}: {str(error).splitlines()[0]}") from error
        mean, deviation = _statistics(place)
        return DenseCLIP(name, model, tokenizer, mean, deviation)

    @property
    def layers(self) -> list[Any]:
        """Vision transformer blocks in order."""
        return list(self.model.vision_model.encoder.layers)

    @property
    def patch(self) -> int:
        return int(self.model.config.vision_config.patch_size)

    @torch.no_grad()
    def hidden(self, image: NDArray[np.uint8], side: int | None = None) -> tuple[list[Tensor], tuple[int, int]]:
        """Block inputs and the last output, L + 1 tensors [1 + n, E], and the patch grid.

        Args:
            image: uint8 [H, W, 3]; squashed to side x side pixels (the model's own size if None; position embeddings
                are interpolated for others).
        """
        size = side or int(self.model.config.vision_config.image_size)
        size = max(1, round(size / self.patch)) * self.patch
        pixels = _pixels(image, (size, size), self.mean, self.deviation)
        output = self.model.vision_model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        return [state[0] for state in output.hidden_states], (size // self.patch,) * 2

    @torch.no_grad()
    def whole(self, image: NDArray[np.uint8]) -> Tensor:
        """Unit vector [P] of the whole picture, in the space of the text."""
        states, _ = self.hidden(image)
        return self.project(self.model.vision_model.post_layernorm(states[-1][0]))

    @torch.no_grad()
    def values(self, state: Tensor, grid: tuple[int, int], out: tuple[int, int]) -> Tensor:
        """Value vectors [h w, E] of the last block for its input or another state, without CLS, on another grid."""
        block = self.layers[-1]
        value = block.self_attn.v_proj(block.layer_norm1(state))[1:]
        maps = value.T.reshape(1, -1, *grid)
        return F.interpolate(maps, out, mode="bilinear", align_corners=False)[0].flatten(1).T

    @torch.no_grad()
    def head(self, mixed: Tensor) -> Tensor:
        """Output projection and final norm [M, E] of mixed value vectors: no residual, no MLP."""
        return self.model.vision_model.post_layernorm(self.layers[-1].self_attn.out_proj(mixed))

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """Features [M, E] in the space of the text, unit length [M, P]."""
        return F.normalize(self.model.visual_projection(features), dim=-1)

    @torch.no_grad()
    def block(self, layer: Any, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vision block on [n, E] with an additive attention mask [n, n]."""
        attention, normed = layer.self_attn, layer.layer_norm1(state)
        heads = int(self.model.config.vision_config.num_attention_heads)
        query, key, value = (
            getattr(attention, name)(normed).unflatten(-1, (heads, -1)).transpose(0, 1)[None]
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1).flatten(1)
        state = state + attention.out_proj(mixed)
        return state + layer.mlp(layer.layer_norm2(state))

    @torch.no_grad()
    def text(self, names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Unit vectors [C, P]: mean over templates of unit vectors, made unit again."""
        chosen = templates or (("{}",) if self.name == "scenes-clip" else TEMPLATES)
        sentences = [template.format(name) for name in names for template in chosen]
        tokens = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        vectors = getattr(output, "pooler_output", output)
        vectors = F.normalize(vectors, dim=-1).reshape(len(names), len(chosen), -1).mean(1)
        return F.normalize(vectors, dim=-1)


@torch.no_grad()
def patch_features(name: str, image: NDArray[np.uint8], side: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Patch features [n, E] and their grid of any vision transformer in transformers: DINO, DINOv2, DINOv3, SAM, ViT.

    Args:
        name: folder or hub id. image: uint8 [H, W, 3], squashed to side x side (the model's own size if None).

    Raises:
        UserError: it cannot be loaded, or gives no patch grid.
    """
    model, mean, deviation = _vision(name)
    config = getattr(model.config, "vision_config", model.config)
    patch = int(config.patch_size)
    size = side or int(getattr(config, "image_size", 224))
    size = max(1, round(size / patch)) * patch
    pixels = _pixels(image, (size, size), mean, deviation)
    if hasattr(model, "vision_encoder"):  # SAM: a map, not a sequence
        maps = model.vision_encoder(pixels).last_hidden_state
        return maps[0].flatten(1).T, tuple(maps.shape[-2:])
    states = model(pixels).last_hidden_state[0]
    grid = (size // patch, size // patch)
    extra = len(states) - grid[0] * grid[1]
    if extra < 0:
        raise UserError(f"{name!r} gives {len(states)} tokens for {grid[0]} x {grid[1]} patches; it has no patch grid")
    return states[extra:], grid


@lru_cache(maxsize=2)
def _vision(name: str) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the features {name!r}: {str(error).splitlines()[0]}") from error
    return model, *_statistics(name)


def _statistics(place: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels, from the checkpoint's preprocessor file; CLIP's own where it has none."""
    import json

    file = Path(place) / "preprocessor_config.json"
    if not file.is_file():
        from transformers.utils import cached_file

        found = cached_file(place, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        file = Path(found) if found else file
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mean = data.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
    deviation = data.get("image_std", (0.26862954, 0.26130258, 0.27577711))
    return tuple(mean), tuple(deviation)


def _pixels(
    image: NDArray[np.uint8], size: tuple[int, int], mean: Sequence[float], deviation: Sequence[float]
) -> Tensor:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255.0
    centre, spread = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, deviation))
    return ((pixels - centre) / spread)[None]
