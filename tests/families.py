"""Tiny random transformers of every family, built from the library's own config classes, and inputs for them.

    fixture = FIXTURES["flux"]
    model = fixture.build()
    model(**fixture.inputs(batch=2, grid=(3, 4), lengths=(7, 5)))

Every parameter is random, also those that the library initialises to zero: a dead path would hide whatever passes
through it. Two layers of each kind, two heads of width 16 (or more where rotary axes need it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
HEADS, WIDTH, TEXT, POOLED, CHANNELS = 2, 16, 24, 20, 4
LENGTHS = (7, 7)


@dataclass(frozen=True)
class Fixture:
    """One family: its transformer class by name, its configuration, and its inputs."""

    transformer: str
    config: dict[str, Any]
    make: Callable[[int, tuple[int, int], Sequence[int]], Inputs]
    """(batch, (h, w) token grid, text length of every sample) -> arguments of the transformer's forward."""
    lengths: tuple[int, int] = LENGTHS
    """Text lengths of two samples: different ones where the family allows it."""
    frames: int = 1

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """The transformer, random with every path live, in evaluation mode."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.transformer)(**(self.config | changes))
            with torch.no_grad():
                for parameter in model.parameters():
                    # Far from uniform and far from one-hot attention, so that a wrong probability shows.
                    fan_in = parameter.numel() // max(1, len(parameter))
                    scale = 0.5 if parameter.ndim < 2 else max(1, fan_in) ** -0.5
                    parameter.copy_(scale * torch.randn(parameter.shape))
        return model.eval()

    def inputs(
        self,
        batch: int = 2,
        grid: tuple[int, int] = (3, 4),
        lengths: Sequence[int] | None = None,
        seed: int = 1,
    ) -> Inputs:
        """Random inputs of `batch` samples with an (h, w) token grid."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(batch, grid, (self.lengths * batch)[:batch] if lengths is None else lengths)


def _text(batch: int, lengths: Sequence[int], width: int = TEXT) -> Tensor:
    return torch.randn(batch, max(lengths), width)


def _mask(lengths: Sequence[int], kind: torch.dtype = torch.bool) -> Tensor:
    return torch.stack([torch.arange(max(lengths)) < length for length in lengths]).to(kind)


def _time(batch: int, value: float = 0.6) -> Tensor:
    return torch.full((batch,), value)


def _latents(batch: int, grid: tuple[int, int], frames: int | None = None, patch: int = 2) -> Tensor:
    space = (patch * grid[0], patch * grid[1])
    return torch.randn(batch, CHANNELS, *(() if frames is None else (frames,)), *space)


def _ids(grid: tuple[int, int], axes: int = 3) -> Tensor:
    h, w = grid
    ids = torch.zeros(h, w, axes)
    ids[..., 1] += torch.arange(h)[:, None]
    ids[..., 2] += torch.arange(w)[None]
    return ids.reshape(h * w, axes)


def _packed(batch: int, grid: tuple[int, int]) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], CHANNELS)


def _flux(
    *, guidance: bool = False, pooled: bool = True, axes: int = 3, text_width: int = TEXT
) -> Callable[[int, tuple[int, int], Sequence[int]], Inputs]:
    def make(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
        inputs: Inputs = {
            "hidden_states": _packed(batch, grid),
            "encoder_hidden_states": _text(batch, lengths, text_width),
            "timestep": _time(batch),
            "img_ids": _ids(grid, axes),
            "txt_ids": torch.zeros(max(lengths), axes),
        }
        if pooled:
            inputs["pooled_projections"] = torch.randn(batch, POOLED)
        if guidance:
            inputs["guidance"] = _time(batch, 3.5)
        return inputs

    return make


def _sd3(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid),
        "encoder_hidden_states": _text(batch, lengths),
        "pooled_projections": torch.randn(batch, POOLED),
        "timestep": _time(batch, 600.0),
    }


def _plain(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid),
        "encoder_hidden_states": _text(batch, lengths),
        "timestep": _time(batch),
    }


def _chroma(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    image = torch.ones(batch, grid[0] * grid[1], dtype=torch.bool)
    return _flux(pooled=False)(batch, grid, lengths) | {"attention_mask": torch.cat([_mask(lengths), image], 1)}


def _qwen(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _packed(batch, grid),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_hidden_states_mask": _mask(lengths),
        "timestep": _time(batch),
        "img_shapes": [[(1, *grid)]] * batch,
    }


def _cogvideox(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2, CHANNELS, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": _text(batch, lengths),
        "timestep": _time(batch, 600.0),
    }


def _cogview(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    size = torch.tensor([[64.0, 48.0]] * batch)
    return {
        "hidden_states": _latents(batch, grid),
        "encoder_hidden_states": _text(batch, lengths),
        "timestep": _time(batch, 600.0),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
    }


def _cogview4(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return _cogview(batch, grid, lengths) | {"attention_mask": _mask(lengths, torch.float32)}


def _hunyuan_video(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid, 2),
        "timestep": _time(batch, 600.0),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_attention_mask": _mask(lengths),
        "pooled_projections": torch.randn(batch, POOLED),
        "guidance": _time(batch, 6000.0),
    }


def _hunyuan_image(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid, patch=1),
        "timestep": _time(batch, 600.0),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_attention_mask": _mask(lengths),
    }


def _hunyuan_video15(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid, 2, patch=1),
        "timestep": _time(batch, 600.0),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_attention_mask": _mask(lengths),
        "encoder_hidden_states_2": torch.randn(batch, 3, TEXT),
        "encoder_attention_mask_2": torch.ones(batch, 3, dtype=torch.bool),
        "image_embeds": torch.randn(batch, 2, TEXT),
    }


def _mochi(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid, 2),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_attention_mask": _mask(lengths),
        "timestep": _time(batch, 600.0),
    }


def _hidream(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], 4 * CHANNELS),
        "hidden_states_masks": torch.ones(batch, grid[0] * grid[1]),
        "img_ids": _ids(grid)[None].repeat(batch, 1, 1),
        "img_sizes": [grid] * batch,
        "timesteps": _time(batch, 600.0),
        "encoder_hidden_states_t5": _text(batch, lengths),
        "encoder_hidden_states_llama3": torch.randn(4, batch, max(lengths), TEXT),
        "pooled_embeds": torch.randn(batch, POOLED),
    }


def _lumina2(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid),
        "timestep": _time(batch, 0.4),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_attention_mask": _mask(lengths),
    }


def _z_image(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "x": [torch.randn(CHANNELS, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": _time(batch, 0.4),
        "cap_feats": [torch.randn(length, TEXT) for length in lengths],
    }


def _krea2(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    ids = torch.cat([torch.zeros(max(lengths), 3), _ids(grid)])
    return {
        "hidden_states": _packed(batch, grid),
        "encoder_hidden_states": torch.randn(batch, max(lengths), 3, TEXT),
        "timestep": _time(batch),
        "position_ids": ids,
        "encoder_attention_mask": _mask(lengths),
    }


def _ernie(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _latents(batch, grid, patch=1),
        "timestep": _time(batch, 600.0),
        "text_bth": _text(batch, lengths),
        "text_lens": torch.tensor(lengths),
    }


def _joy_plus(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    """Without references: `tests/models/test_registry.py` has them."""
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], CHANNELS, 1, 2, 2),
        "encoder_hidden_states": _text(batch, lengths),
        "encoder_hidden_states_mask": _mask(lengths, torch.long),
        "timestep": _time(batch, 600.0),
        "shape_list": [[(1, *grid)]] * batch,
    }


def _easyanimate(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return _plain(batch, grid, lengths) | {"hidden_states": _latents(batch, grid, 2)}


def _motif(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    """A video that begins with a picture."""
    further = {"encoder_attention_mask": _mask(lengths), "image_embeds": torch.randn(batch, 1, TEXT)}
    return _easyanimate(batch, grid, lengths) | further


def _prx(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return _plain(batch, grid, lengths) | {"attention_mask": _mask(lengths)}


def _glm(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    inputs = _cogview(batch, grid, lengths)
    inputs.pop("original_size")
    return inputs | {
        "prior_token_id": torch.randint(0, 8, (batch, grid[0] * grid[1])),
        "prior_token_drop": torch.zeros(batch, dtype=torch.bool),
    }


def _fibo(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    layers = [torch.randn(batch, max(lengths), TEXT) for _ in range(4)]
    return _flux(pooled=False)(batch, grid, lengths) | {"text_encoder_layers": layers}


def _flux3(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    inputs = _flux(pooled=False, axes=4)(batch, grid, lengths)
    references = torch.cat([torch.full((5, 1), 2.0), _ids((1, 5), 4)[:, 1:]], 1)
    return inputs | {"image_cond_hidden_states": torch.randn(batch, 5, CHANNELS), "image_cond_ids": references}


def _framepack(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    def frames(count: int) -> Tensor:
        return _latents(batch, grid, count)

    def indices(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count)

    return _hunyuan_video(batch, grid, lengths) | {
        "image_embeds": torch.randn(batch, 2, TEXT),
        "indices_latents": indices(7, 2),
        "latents_clean": frames(1),
        "indices_latents_clean": indices(6, 1),
        "latents_history_2x": frames(2),
        "indices_latents_history_2x": indices(4, 2),
        "latents_history_4x": frames(4),
        "indices_latents_history_4x": indices(0, 4),
    }


def _ideogram4(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    image, longest = grid[0] * grid[1], max(lengths)
    indicator = torch.full((batch, longest + image), 2)
    for row, length in enumerate(lengths):
        indicator[row, : longest - length], indicator[row, longest - length : longest] = 0, 3
    text = torch.arange(longest)[:, None].expand(-1, 3)
    return {
        "hidden_states": torch.randn(batch, longest + image, CHANNELS),
        "encoder_hidden_states": torch.randn(batch, longest + image, TEXT),
        "timestep": _time(batch, 0.4),
        "position_ids": torch.cat([text, longest + _ids(grid).long()])[None].expand(batch, -1, -1),
        "segment_ids": torch.where(indicator == 0, -1, 1),
        "indicator": indicator,
    }


def _minimax_h3(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    """[text, sound, two frames of video]."""
    text, sound, image = max(lengths), 3, 2 * grid[0] * grid[1]
    places = torch.zeros(text + sound + image, 3)
    places[:text] = torch.arange(text)[:, None].float()
    places[text + sound :] = torch.cat([_ids(grid) + torch.tensor([frame, 0, 0]) for frame in range(2)])
    return {
        "hidden_states": torch.randn(batch, image, 4 * CHANNELS),
        "audio_hidden_states": torch.randn(batch, sound, CHANNELS),
        "encoder_hidden_states": _text(batch, lengths),
        "timestep": torch.tensor([0.4]),
        "timestep_indices": torch.zeros(len(places), dtype=torch.long),
        "token_tags": torch.tensor([1] * text + [2] * sound + [0] * image),
        "position_ids": places,
        "video_indices": torch.arange(text + sound, len(places)),
        "audio_indices": torch.arange(text, text + sound),
        "text_indices": torch.arange(text),
    }


def _fibo2(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    """Text [B, layers, T, width]: the perceiver's, and the one of the layer that reads it."""
    return _plain(batch, grid, lengths) | {"encoder_hidden_states": torch.randn(batch, 2, max(lengths), TEXT)}


def _qwen21(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    """A slot of the language model stands for 2 x 2 tokens of the image."""
    text, image = max(lengths), grid[0] * grid[1]
    return {
        "hidden_states": torch.randn(batch, image, CHANNELS),
        "encoder_hidden_states": _text(batch, lengths),
        "timestep": _time(batch),
        "img_shapes": [[(1, *grid)]] * batch,
        "img_mask": (torch.arange(text + image // 4) >= text).expand(batch, -1),
    }


def _cosmos3(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    """One sample: there is no batch."""
    text, image = max(lengths), grid[0] * grid[1]
    places = torch.arange(text, text + image)
    return {
        "input_ids": torch.randint(1, 16, (text,)),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(text + image).expand(3, -1),
        "und_len": text,
        "sequence_length": text + image,
        "vision_tokens": [torch.randn(1, CHANNELS, 1, 2 * grid[0], 2 * grid[1])],
        "vision_token_shapes": [(1, *grid)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((image,), 600.0),
        "vision_noisy_frame_indexes": [torch.arange(1)],
    }


def _omnigen(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    text, image = max(lengths), grid[0] * grid[1]
    mask = torch.ones(text + 1 + image, text + 1 + image)
    mask[: text + 1] = mask[: text + 1].tril()
    return {
        "hidden_states": _latents(batch, grid),
        "timestep": _time(batch, 0.4),
        "input_ids": torch.randint(1, 16, (batch, text)),
        "input_img_latents": [torch.randn(1, CHANNELS, 2, 4) for _ in range(batch)],
        "input_image_sizes": {row: [(2, 4)] for row in range(batch)},
        "attention_mask": mask.expand(batch, -1, -1),
        "position_ids": torch.arange(text + 1 + image)[None].expand(batch, -1),
    }


def _pixart(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return _plain(batch, grid, lengths) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _ltx(batch: int, grid: tuple[int, int], lengths: Sequence[int]) -> Inputs:
    return {
        "hidden_states": _packed(batch, grid),
        "encoder_hidden_states": _text(batch, lengths),
        "timestep": _time(batch, 600.0),
        "encoder_attention_mask": _mask(lengths, torch.int64),
        "num_frames": 1,
        "height": grid[0],
        "width": grid[1],
    }


_FLUX = {
    "patch_size": 1, "in_channels": CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": WIDTH,
    "num_attention_heads": HEADS, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2,
    "attention_head_dim": WIDTH, "num_attention_heads": HEADS, "joint_attention_dim": TEXT,
    "caption_projection_dim": HEADS * WIDTH, "pooled_projection_dim": POOLED, "pos_embed_max_size": 16,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": HEADS, "attention_head_dim": WIDTH,
    "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": TEXT, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip

_JOY = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "hidden_size": HEADS * WIDTH,
    "num_attention_heads": HEADS,
    "text_dim": TEXT,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}

FIXTURES: dict[str, Fixture] = {
    "sd3": Fixture("SD3Transformer2DModel", _SD3, _sd3),
    "sd35": Fixture("SD3Transformer2DModel", _SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}, _sd3),
    "flux": Fixture("FluxTransformer2DModel", _FLUX | {"guidance_embeds": True}, _flux(guidance=True)),
    "aura_flow": Fixture(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": HEADS * WIDTH,
            "out_channels": CHANNELS,
            "pos_embed_max_size": 64,
        },
        _plain,
    ),
    "qwen_image": Fixture(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen,
        lengths=(7, 4),
    ),
    "cogvideox": Fixture(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 6,
            "sample_frames": 5,
            "patch_size": 2,
            "max_text_seq_length": 7,
        },
        _cogvideox,
        frames=2,
    ),
    "consisid": Fixture(
        "ConsisIDTransformer3DModel",
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 6,
            "sample_frames": 5,
            "patch_size": 2,
            "max_text_seq_length": 7,
        },
        _cogvideox,
        frames=2,
    ),
    "cogview4": Fixture(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 8,
            "rope_axes_dim": (16, 16),
        },
        _cogview4,
        lengths=(7, 4),
    ),
    "cogview3plus": Fixture(
        "CogView3PlusTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        _cogview,
    ),
    "hunyuan_video": Fixture(
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN | {"num_single_layers": 2, "pooled_projection_dim": POOLED, "guidance_embeds": True},
        _hunyuan_video,
        lengths=(7, 4),
        frames=2,
    ),
    "hunyuan_image": Fixture(
        "HunyuanImageTransformer2DModel",
        _HUNYUAN | {"num_single_layers": 2, "patch_size": (1, 1), "rope_axes_dim": (8, 8)},
        _hunyuan_image,
        lengths=(7, 4),
    ),
    "hunyuan_video15": Fixture(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN | {"patch_size": 1, "text_embed_2_dim": TEXT, "image_embed_dim": TEXT},
        _hunyuan_video15,
        lengths=(7, 4),
        frames=2,
    ),
    "mochi": Fixture(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "num_layers": 2,
            "pooled_projection_dim": 2 * WIDTH,
            "in_channels": CHANNELS,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "max_sequence_length": 7,
        },
        _mochi,
        lengths=(7, 4),
        frames=2,
    ),
    "hidream": Fixture(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "caption_channels": [TEXT, TEXT],
            "text_emb_dim": POOLED,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 3],
            "force_inference_output": True,
        },
        _hidream,
    ),
    "lumina2": Fixture(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "hidden_size": 4 * WIDTH,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (30, 16, 16),
            "cap_feat_dim": TEXT,
        },
        _lumina2,
        lengths=(7, 4),
    ),
    "z_image": Fixture(
        "ZImageTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": HEADS * WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 16, 16],
        },
        _z_image,
        lengths=(7, 4),
    ),
    "chroma": Fixture(
        "ChromaTransformer2DModel",
        {k: v for k, v in _FLUX.items() if k != "pooled_projection_dim"}
        | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _chroma,
        lengths=(7, 4),
    ),
    "flux2": Fixture(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux(guidance=True, pooled=False, axes=4),
    ),
    "bria": Fixture("BriaTransformer2DModel", _FLUX | {"pooled_projection_dim": None}, _flux(pooled=False)),
    "longcat_image": Fixture("LongCatImageTransformer2DModel", _FLUX, _flux(pooled=False)),
    "ovis_image": Fixture(
        "OvisImageTransformer2DModel",
        {k: v for k, v in _FLUX.items() if k != "pooled_projection_dim"} | {"out_channels": CHANNELS},
        _flux(pooled=False),
    ),
    "krea2": Fixture(
        "Krea2Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": TEXT,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        _krea2,
        lengths=(7, 4),
    ),
    "ernie_image": Fixture(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": HEADS * WIDTH,
            "num_attention_heads": HEADS,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_in_dim": TEXT,
            "rope_axes_dim": (4, 6, 6),
        },
        _ernie,
        lengths=(7, 4),
    ),
    "easyanimate": Fixture(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 6,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
        },
        _easyanimate,
        frames=2,
    ),
    "joyimage_edit": Fixture(
        "JoyImageEditTransformer3DModel",
        _JOY,
        _easyanimate,
        frames=2,
    ),
    "joyimage_edit_plus": Fixture(
        "JoyImageEditPlusTransformer3DModel",
        _JOY,
        _joy_plus,
        lengths=(7, 5),
    ),
    "motif_video": Fixture(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "text_embed_dim": TEXT,
            "image_embed_dim": TEXT,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif,
        lengths=(7, 4),
        frames=2,
    ),
    "flux3": Fixture(
        "Flux3Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "cond_in_channels": CHANNELS,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "timestep_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux3,
    ),
    "hunyuan_video_framepack": Fixture(
        "HunyuanVideoFramepackTransformer3DModel",
        _HUNYUAN
        | {
            "num_single_layers": 2,
            "pooled_projection_dim": POOLED,
            "guidance_embeds": True,
            "has_image_proj": True,
            "image_proj_dim": TEXT,
            "has_clean_x_embedder": True,
        },
        _framepack,
        lengths=(7, 4),
        frames=2,
    ),
    "ideogram4": Fixture(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "intermediate_size": 32,
            "adaln_dim": 8,
            "llm_features_dim": TEXT,
            "mrope_section": (3, 3, 2),
        },
        _ideogram4,
        lengths=(7, 4),
    ),
    "omnigen": Fixture(
        "OmniGenTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "patch_size": 2,
            "hidden_size": 4 * WIDTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pos_embed_max_size": 16,
            "time_step_dim": 8,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        _omnigen,
    ),
    "minimax_h3": Fixture(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "hidden_size": HEADS * WIDTH,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": CHANNELS,
            "audio_in_channels": CHANNELS,
            "text_dim": TEXT,
            "freq_dim": 8,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
        frames=2,
    ),
    "prx": Fixture(
        "PRXTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "context_in_dim": TEXT,
            "hidden_size": HEADS * WIDTH,
            "num_heads": HEADS,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        _prx,
        lengths=(7, 4),
    ),
    "nucleus_image": Fixture(
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 6, 6),
            "moe_enabled": False,
        },
        _qwen,
        lengths=(7, 4),
    ),
    "glm_image": Fixture(
        "GlmImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 8,
        },
        _glm,
    ),
    "bria_fibo": Fixture(
        "BriaFiboTransformer2DModel",
        _FLUX | {"pooled_projection_dim": None, "text_encoder_dim": TEXT},
        _fibo,
    ),
}

SEVERAL_CALLS: dict[str, Fixture] = {
    "qwen_image21": Fixture(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": WIDTH,
            "num_attention_heads": HEADS,
            "context_in_dim": TEXT,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen21,
    ),
    "cosmos3": Fixture(
        "Cosmos3OmniTransformer",
        {
            "head_dim": WIDTH,
            "hidden_size": HEADS * WIDTH,
            "intermediate_size": 32,
            "latent_channel": CHANNELS,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 2,
            "num_key_value_heads": HEADS,
            "patch_latent_dim": 4 * CHANNELS,
            "vocab_size": 16,
            "rope_axes_dim": (4, 2, 2),
        },
        _cosmos3,
    ),
}
"""Transformers whose layers make more than one attention call."""

CROSS_ATTENTION: dict[str, Fixture] = {
    "bria_fibo2": Fixture(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": HEADS * WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "cap_feat_dim": TEXT,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 16, 16),
        },
        _fibo2,
    ),
    "pixart": Fixture(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": HEADS * WIDTH,
            "sample_size": 8,
            "caption_channels": TEXT,
            "use_additional_conditions": False,
        },
        _pixart,
    ),
    "wan": Fixture(
        "WanTransformer3DModel",
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_dim": TEXT,
            "freq_dim": 8,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 16,
        },
        _easyanimate,
        frames=2,
    ),
    "sana": Fixture(
        "SanaTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "num_layers": 2,
            "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": WIDTH,
            "cross_attention_dim": HEADS * WIDTH,
            "caption_channels": TEXT,
            "sample_size": 8,
            "patch_size": 2,
        },
        _plain,
    ),
    "ltx": Fixture(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH,
            "cross_attention_dim": HEADS * WIDTH,
            "num_layers": 2,
            "caption_channels": TEXT,
        },
        _ltx,
    ),
}
