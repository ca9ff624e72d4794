"""CLIP, and patch features of other networks: one loader and one way from pictures to pixels, for all that read them.

    clip = CLIP.open("scenes-clip")                  # embedded, a folder, or a hub id; nothing is downloaded implicitly
    clip.vectors(clip.pixels([image]))               # [1, P], unit length, in the space of clip.text(["cat"])  [1, P]
    states, grid = clip.hidden(clip.pixels([image], (224, 336)))           # L + 1 states [1 + n, E], CLS first

Pixels go through the checkpoint's own image processor. Blocks are run step by step, by the public parts of `CLIPModel`,
where a method changes them; no module is patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pil
from torch import Tensor
from torch.nn import functional as F

from mmdit_probe import assets
from mmdit_probe.errors import UserError, first_line
from mmdit_probe.quiet import quiet, reached
from mmdit_probe.segment.tail import resized

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "there is a {} in the scene.", "{}")
"""A short ensemble in place of the 80 ImageNet templates; the embedded CLIP takes the bare name."""


@dataclass(frozen=True)
class CLIP:
    """A CLIP model with its tokenizer and image processor."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @staticmethod
    @lru_cache(maxsize=2)
    def open(name: str, device: str | torch.device = "cpu") -> CLIP:
        """Load by embedded name, folder or hub id (from the local cache; downloads only if the hub is reachable).

        Raises:
            UserError: not there, or not a CLIP model.
        """
        place = str(assets.path(name)) if name in assets.names() else name
        with quiet(place):
            from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

            try:
                here = reached(place)
                kind = AutoConfig.from_pretrained(place, **here).model_type
                if kind != "clip":
                    raise UserError(f"{name!r} is a {kind!r} model; expected a CLIP model, e.g. scenes-clip")
                model = CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **here)
                tokenizer = AutoTokenizer.from_pretrained(place, **here)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"cannot load the CLIP {name!r}: expected scenes-clip, a folder or a hub id ({first_line(error)})"
                ) from error
            side = int(model.config.vision_config.image_size)
            processor = _processor(place) or CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
        model = model.to(device).eval().requires_grad_(False)
        return CLIP(Path(name).name, model, tokenizer, processor)

    @property
    def layers(self) -> list[Any]:
        """Vision transformer blocks in order."""
        return list(self.model.vision_model.encoder.layers)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.config.vision_config.patch_size)

    @property
    def width(self) -> int:
        """Channels of the space that pictures and texts share."""
        return int(self.model.config.projection_dim)

    def side(self, wanted: int | None = None) -> int:
        """Side of a square input in pixels: the model's own, or the whole number of patches nearest to `wanted`."""
        size = wanted or int(self.model.config.vision_config.image_size)
        return max(1, round(size / self.patch)) * self.patch

    def pixels(self, images: Sequence[Any], size: tuple[int, int] | None = None) -> Tensor:
        """Input [n, 3, H, W] of PIL images or uint8 arrays [height, width, 3].

        Args:
            size: (H, W) that whole pictures are squashed to; None resizes and crops as the checkpoint says.
        """
        if size is not None:
            return _squashed(self.processor, images, size).to(self.model.device)
        found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return found.to(self.model.device)  # type: ignore[no-any-return]

    @torch.no_grad()
    def vectors(self, pixels: Tensor) -> Tensor:
        """Unit vectors [n, P] of inputs [n, 3, H, W]."""
        found = self.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
        return F.normalize(_pooled(found), dim=-1)

    @torch.no_grad()
    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, P] of texts; what is longer than the text encoder is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        found = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(_pooled(found), dim=-1)

    def text(self, names: Sequence[str]) -> Tensor:
        """Unit vectors [C, P] of names: mean over templates of unit vectors, made unit again."""
        templates = ("{}",) if self.name == "scenes-clip" else TEMPLATES
        vectors = self.sentences([template.format(name) for name in names for template in templates])
        return F.normalize(vectors.reshape(len(names), len(templates), -1).mean(1), dim=-1)

    @torch.no_grad()
    def hidden(self, pixels: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Block inputs and the last output, L + 1 tensors [1 + n, E], and the patch grid.

        Args:
            pixels: one input [1, 3, H, W] or [3, H, W], sides multiples of the patch; position embeddings are
                interpolated where it is not the model's own size.
        """
        one = pixels if pixels.ndim == 4 else pixels[None]
        if len(one) != 1 or one.shape[1] != 3 or one.shape[2] % self.patch or one.shape[3] % self.patch:
            raise UserError(
                f"CLIP input of shape {tuple(pixels.shape)}: expected [3, H, W], sides multiples of {self.patch}"
            )
        one = one.to(self.model.device, torch.float32)
        output = self.model.vision_model(one, output_hidden_states=True, interpolate_pos_encoding=True)
        return [state[0] for state in output.hidden_states], (one.shape[2] // self.patch, one.shape[3] // self.patch)

    @torch.no_grad()
    def values(self, state: Tensor, grid: tuple[int, int], out: tuple[int, int]) -> Tensor:
        """Value vectors [h w, E] of the last block for its input or another state, without CLS, on another grid."""
        block = self.layers[-1]
        value = block.self_attn.v_proj(block.layer_norm1(state))[1:]
        return resized(value.T.reshape(-1, *grid), out).flatten(1).T

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


@dataclass(frozen=True)
class PatchVectors:
    """Patch vectors of any CLIP, made beforehand, in the place of the CLIP: what it would gather and project.

    Attributes:
        vectors, last: `features` and `head` of `ClipInput`.
    """

    vectors: Tensor
    last: Callable[[Tensor], Tensor] | None = None

    patch = 1

    @property
    def width(self) -> int:
        return int(self.project(self.vectors[0, :1]).shape[-1])

    @property
    def pixels(self) -> Tensor:
        """A picture [3, h, w] of one pixel per patch, of which nothing is read."""
        return torch.zeros(3, *self.vectors.shape[:2])

    def hidden(self, pixels: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """The vectors [h w, P] as every state, and their grid."""
        return [self.vectors.flatten(0, 1)] * 2, (self.vectors.shape[0], self.vectors.shape[1])

    def values(self, state: Tensor, grid: tuple[int, int], out: tuple[int, int]) -> Tensor:
        return resized(state.T.reshape(-1, *grid), out).flatten(1).T

    def head(self, mixed: Tensor) -> Tensor:
        return mixed

    def project(self, features: Tensor) -> Tensor:
        return F.normalize(features if self.last is None else self.last(features), dim=-1)


@dataclass(frozen=True)
class ClipInput:
    """A CLIP with one's own inputs, in place of what would be made of the picture and of the class names.

    Attributes:
        clip: embedded name, folder or hub id; or a loaded one. Not used where there are `features`.
        text: [Q, P] unit vectors of the names, in order. pixels: [3, H, W] CLIP's input.
        features: [h, w, E] patch vectors on any grid over the whole picture; no CLIP is run. Without `head` they are in
            the space of the text (E = P) and gathered there. The official codes gather the last block's values and
            norm what was gathered, which a mean of normed vectors is not: for their result give values and a head.
        head: from gathered features [M, E] to the text's space [M, P]: for values after the output projection the last
            norm and the projection, in front of them the output projection for plain values.

    Raises:
        UserError: features without text, with pixels, or of another shape; a head without features.
    """

    clip: str | CLIP = "scenes-clip"
    text: Tensor | None = None
    pixels: Tensor | None = None
    features: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.features is None:
            if self.head is not None:
                raise UserError("a head is of CLIP features; give them beside it")
            return
        if self.text is None or self.pixels is not None:
            raise UserError("CLIP features stand for the picture: give text vectors beside them, and no pixels")
        if self.features.ndim != 3 or not self.features.isfinite().all():
            raise UserError(f"CLIP features of shape {tuple(self.features.shape)}: expected finite [h, w, E]")

    @property
    def model(self) -> CLIP | PatchVectors:
        if self.features is not None:
            return PatchVectors(self.features.float(), self.head)
        return self.clip if isinstance(self.clip, CLIP) else CLIP.open(self.clip)

    def vectors(self, names: Sequence[str]) -> Tensor:
        """Unit vectors [Q, P] of the names: one's own, or those of the CLIP.

        Raises:
            UserError: one's own have another shape.
        """
        model = self.model
        if self.text is None and isinstance(model, CLIP):
            return model.text(names)
        if self.text is None or self.text.shape != (len(names), model.width):
            found = None if self.text is None else tuple(self.text.shape)
            raise UserError(f"text of shape {found}: expected [{len(names)}, {model.width}]")
        return self.text.float()

    def input(self, picture: Callable[[], Any], size: tuple[int, int]) -> Tensor:
        """CLIP's input [3, H, W]: one's own pixels, or a picture squashed to a size."""
        model = self.model
        if isinstance(model, PatchVectors):
            return model.pixels
        found = model.pixels([picture()], size) if self.pixels is None else self.pixels
        return found if found.ndim == 3 else found[0]


@torch.no_grad()
def patch_features(name: str, image: Any, size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Patch features [n, E] and their grid of any vision transformer in transformers: DINO, DINOv2, DINOv3, SAM, ViT.

    Args:
        name: folder or hub id. image: uint8 [H, W, 3], squashed to the model's own size.
        size: (H, W) to squash it to instead, in whole patches, where the model interpolates its positions.

    Raises:
        UserError: it cannot be loaded, or gives no patch grid.
    """
    model, processor = _vision(name)
    config = getattr(model.config, "vision_config", model.config)
    patch = int(config.patch_size)
    given = inspect.signature(model.forward).parameters
    own = size is None or "interpolate_pos_encoding" not in given
    wanted = (int(getattr(config, "image_size", 224)),) * 2 if own or size is None else size
    grid = (max(1, round(wanted[0] / patch)), max(1, round(wanted[1] / patch)))
    pixels = _squashed(processor, [image], (grid[0] * patch, grid[1] * patch))
    if hasattr(model, "vision_encoder"):  # SAM: a map, not a sequence
        maps = model.vision_encoder(pixels).last_hidden_state
        return maps[0].flatten(1).T, tuple(maps.shape[-2:])
    states = model(pixels, **({} if own else {"interpolate_pos_encoding": True})).last_hidden_state[0]
    extra = len(states) - grid[0] * grid[1]
    if extra < 0:
        raise UserError(f"{name!r} gives {len(states)} tokens for {grid[0]} x {grid[1]} patches; it has no patch grid")
    return states[extra:], grid


@lru_cache(maxsize=2)
def _vision(name: str) -> tuple[Any, Any]:
    with quiet(name):
        from transformers import AutoModel, CLIPImageProcessor

        try:
            here = reached(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True, adapter_kwargs=here, **here).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the features {name!r}: {first_line(error)}") from error
        return model, _processor(name) or CLIPImageProcessor()


def image_processor(place: str) -> Any:
    """A checkpoint's image processor, which works with PIL whether or not torchvision is there.

    Raises:
        OSError, ValueError: it has none.
    """
    with quiet(place):
        # By its module: the package's own name for it asks for torchvision in many versions (5.5 to 5.17 at least).
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(place, backend="pil", **reached(place))


def _processor(place: str) -> Any:
    """The checkpoint's image processor; None where it has none."""
    try:
        return image_processor(place)
    except (OSError, ValueError):
        return None


def _squashed(processor: Any, images: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Pixels [n, 3, H, W] of whole pictures stretched to a size (H, W), scaled and normalised by the processor."""
    found = []
    for image in images:
        picture = image if isinstance(image, pil.Image) else pil.fromarray(np.ascontiguousarray(image))
        found.append(picture.convert("RGB").resize((size[1], size[0]), pil.Resampling.BICUBIC))
    off = {"do_resize": False, "do_center_crop": False}
    if getattr(processor, "do_pad", None):
        off["do_pad"] = False
    return processor(images=found, return_tensors="pt", **off)["pixel_values"]  # type: ignore[no-any-return]


def _pooled(features: Any) -> Tensor:
    """transformers 5 returns an output object where version 4 returned the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output
