"""MMDiT: one loaded model, with the few operations that probing needs, on top of the stock diffusers pipeline.

    model = load("scenes-sd3")
    text = model.encode_prompt(["a red ring on grass"])
    latents = model.noise(model.encode_image(image), sigma=0.5, seed=0)
    velocity = model.denoise(latents, 0.5, text)          # one transformer call: what `probe` observes
    images = model.generate("a red ring on grass", seed=0)

Rectified flow throughout: x_t = (1 - sigma) x + sigma n, the model predicts the velocity n - x. `model.pipeline` stays
the stock pipeline; this class copies none of its steps.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit_probe import assets
from mmdit_probe.attention.intercept import interpose
from mmdit_probe.data.words import find, words
from mmdit_probe.errors import ProbeWarning, UserError, brief, check_known, counted
from mmdit_probe.models import latents as packing
from mmdit_probe.models.families.registry import Family, family_of
from mmdit_probe.models.layout import Layer, arranged, find_layers, unwrap
from mmdit_probe.models.names import HEAD_COUNTS
from mmdit_probe.models.pipeline_call import first_call
from mmdit_probe.models.tokens import TokenTable, picture_positions, stream_length, token_tables
from mmdit_probe.models.weights import compute_dtype, weight_hash, weight_state
from mmdit_probe.quiet import barless
from mmdit_probe.results.clip import Clip
from mmdit_probe.scenes.captions import WORDS
from mmdit_probe.specs import number, seed_values, whole

_REMEMBERED = 8
"""Transformer calls whose arguments are kept: one per set of prompts and size."""
_STEPS = 3
"""Of a dry run: the second noise level is neither the first, 1, nor the last, near 0."""
_LISTED = 15
"""Known words that a note of unknown ones lists."""
_LATENTS = 128
"""Side of the latents of 1024 pixels, for pipelines that do not say what size they were made for."""


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts: embeddings [B, T, C] and [B, P], and what each text position is (one table per prompt)."""

    prompt_embeds: Tensor
    pooled: Tensor
    tokens: list[TokenTable]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """What is known of the rows of the next denoising call, row by row; a probe labels its results with it.

    Attributes:
        tokens: token table per row, or None if the text came as embeddings.
        prompts: the image's prompt per row (for an unconditional row: the prompt of its image).
        seeds: noise seed per row; -1 where unknown.
        branches: "cond", "uncond" or "unknown" per row.
        sigmas: noise level per row, or None to take it from the timestep.
        step: sampling step, or None to take it from the scheduler.
    """

    tokens: Sequence[TokenTable | None] | None
    prompts: list[str]
    seeds: list[int]
    branches: list[str]
    sigmas: list[float] | None = None
    step: int | None = None

    def __len__(self) -> int:
        return len(self.prompts)


class MMDiT:
    """A multi-modal diffusion transformer in its stock pipeline. Made by `load`, or from a pipeline of one's own.

    Attributes:
        pipeline: the stock diffusers pipeline. transformer, scheduler: its parts.
        name: what it was loaded as. family: the facts that apply.
        max_sequence_length: length of the text streams that have no fixed one (SD3: T5's positions). Default: the
            smaller of the tokenizer's own limit and the family's default. own_length: what it was at first.
        num_frames: of the videos that it makes, 1 of pictures.
        size: (height, width) in pixels of what it makes where nobody says; None: the model's own.
        offload, quantize: as `load` was told; None where the pipeline came from elsewhere.
        batch: what is known of the denoising call in progress (read by `probe`); None between calls.
        references: pictures (PIL) that an editing pipeline is given beside the prompt, by `generate`, `encode_prompt`
            and `denoise`: what is edited, or gone by. The pipeline may resize them.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str = "",
        max_sequence_length: int | None = None,
        offload: str | None = None,
        quantize: str | None = None,
    ) -> None:
        if getattr(pipeline, "transformer", None) is None:
            raise UserError(
                f"MMDiT({brief(pipeline)}): expected a diffusers pipeline with its transformer; load(...) takes names,"
                " folders"
            )
        if "prompt" not in inspect.signature(type(pipeline).__call__).parameters:
            raise UserError(
                f"{type(pipeline).__name__} takes what its blocks ask for (a modular pipeline), and no prompt, size or"
                " seed by name: give it to `probe` and call it yourself"
            )
        self.pipeline = pipeline
        self.offload, self.quantize = offload, quantize
        self.name = name or type(pipeline).__name__
        self.family: Family = family_of(unwrap(pipeline.transformer))
        self.own_length = default_length(pipeline, self.family) if max_sequence_length is None else max_sequence_length
        self.max_sequence_length = self.own_length
        self._num_frames = _own_frames(pipeline) if self.makes_videos else 1
        self.size: tuple[int, int] | None = None
        self.batch: Batch | None = None
        self.references: Sequence[Any] = ()
        self._known: dict[tuple[Any, ...], tuple[dict[str, Any], list[int]]] = {}
        self._encoders: Any = None
        self._hashed: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        """E.g. MMDiT('scenes-sd3': sd3, 12 layers x 6 heads, 48 text positions, 64 x 64 pixels, float32 on cpu)."""
        height, width = self.default_size
        dtype = str(self.dtype).removeprefix("torch.")
        frames = f"{counted(self.num_frames, 'frame')} of " if self.makes_videos else ""
        return (
            f"MMDiT({self.name!r}: {self.family.name}, {len(self.layers)} layers x {self.heads} heads,"
            f" {self.text_length} text positions, {frames}{height} x {width} pixels, {dtype} on {self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What pickle writes: the facts of a family are looked up again. It cannot write the hooks that transformers
        leaves on its encoders (CLIP, Qwen; not T5) when they first ran: of the stock pipeline neither."""
        return {name: value for name, value in self.__dict__.items() if name != "family"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, family=family_of(unwrap(state["pipeline"].transformer)))

    def given(self, references: Sequence[Any]) -> MMDiT:
        """The same model whose editing pipeline is given these pictures (PIL) beside the prompt."""
        found = copy.copy(self)
        found.references = tuple(references)
        return found

    @property
    def memory(self) -> dict[str, str | None]:
        """What a record says of where the weights wait and how they are stored."""
        return {"offload": self.offload, "quantize": self.quantize}

    @property
    def makes_videos(self) -> bool:
        """Whether its pipeline makes videos, and no pictures."""
        return self.family.video_size is not None

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def device(self) -> torch.device:
        """Where the model runs; its weights may lie elsewhere (CPU offload)."""
        return torch.device(self.pipeline._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in; its weights may be stored in another one."""
        return compute_dtype(unwrap(self.transformer))

    @property
    def layers(self) -> list[Layer]:
        """Joint-attention layers, 0-based, in forward order."""
        return find_layers(self.family, unwrap(self.transformer))

    @property
    def heads(self) -> int:
        """Attention heads H per layer."""
        config = self.transformer.config
        return int(next(config[name] for name in HEAD_COUNTS if name in config))

    @property
    def text_length(self) -> int:
        """T, the number of text positions in the joint attention; at most, where prompts are not padded."""
        streams = self.family.streams
        return sum(stream_length(self.pipeline, self.family, s, self.max_sequence_length) for s in streams)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what it makes where nobody says: `size`, or what the model was made for."""
        if self.size is not None:
            return self.size
        if self.family.video_size is not None:
            return self.family.video_size(self.pipeline)
        config: Any = self.transformer.config
        size = getattr(self.pipeline, "default_sample_size", None) or getattr(config, "sample_size", None)
        known = inspect.signature(type(self.pipeline).__call__).parameters
        if not size and known["height"].default:
            return known["height"].default, known["width"].default
        unit = 1 if self.family.size_in_pixels and size else int(self.pipeline.vae_scale_factor)
        side = int(size or _LATENTS) * unit
        return side, side

    def check_pictures(self) -> None:
        """Raises a UserError of a model of videos, where pictures are read."""
        if self.makes_videos:
            raise UserError(
                f"{type(self.pipeline).__name__} makes videos and reads no pictures here: give prompts in place of"
                " pictures, or a model that makes pictures"
            )

    @property
    def latent_side(self) -> int:
        """Side of one latent cell in pixels."""
        return int(self.pipeline.vae_scale_factor) // (self.family.cell if self.family.scale_of_tokens else 1)

    @property
    def size_multiple(self) -> int:
        """Heights and widths of pictures must be multiples of this many pixels: one token's side."""
        self.check_pictures()
        return self.latent_side * int(self.family.cell or self.transformer.config.patch_size)

    @property
    def num_frames(self) -> int:
        """Frames of what it makes. Setting it raises a UserError of a model of pictures."""
        return self._num_frames

    @num_frames.setter
    def num_frames(self, count: int) -> None:
        if count != 1 and not self.makes_videos:
            raise UserError(f"{self.name} makes pictures, no videos: leave num_frames out")
        self._num_frames = count

    def token_grid(self, height: int, width: int) -> tuple[int, ...]:
        """(h, w) of the image tokens of a picture of so many pixels; (frames, h, w) of a video."""
        if not self.makes_videos:
            return height // self.size_multiple, width // self.size_multiple
        inputs, _ = self._dry_run([""], _STEPS, height=height, width=width)
        found = self.family.arrangement(inputs, unwrap(self.transformer).config)
        return (found.frames, *(found.grid or ()))

    @property
    def weight_hash(self) -> str:
        """SHA-256 over the transformer's parameters and buffers, however they are stored. Computed once for the weights
        that there are."""
        transformer = unwrap(self.transformer)
        state = weight_state(transformer)
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = state, weight_hash(transformer)
        return self._hashed[1]

    @property
    def parts(self) -> dict[str, str]:
        """The pipeline's other networks (text encoders, VAE, ControlNets), each with a hash of some of its weights."""
        networks = {name: unwrap(one) for name, one in vars(self.pipeline).items() if isinstance(one, torch.nn.Module)}
        own = unwrap(self.transformer)
        return {name: weight_hash(one, drawn=True)[:16] for name, one in sorted(networks.items()) if one is not own}

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that the model can know: of an embedded model those of the scenes world; () if any."""
        return WORDS if is_embedded(self.pipeline) else ()

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that the model has never met, in order; signs are no words. Empty where it may know any."""
        found = dict.fromkeys(prompt[start:stop] for start, stop in words(prompt) if prompt[start].isalnum())
        return [word for word in found if self.vocabulary and not any(find(word, known) for known in self.vocabulary)]

    def notes_on_words(self, prompts: str | Sequence[str]) -> list[str]:
        """A line that names the words of prompts (or of classes) that the model cannot know, if there are any, and one
        where prompts are empty.

        "scenes-sd3 knows 43 words; not: cat, kitten (it knows ring, star, ...)"
        """
        texts = _texts(prompts) if len(prompts) else []
        unknown = dict.fromkeys(word.lower() for text in texts for word in self.unknown_words(text))
        known = f"(it knows {', '.join(self.vocabulary[:_LISTED])}, ...)"
        told = f"{self.name} knows {len(self.vocabulary)} words; not: {', '.join(unknown)} {known}"
        notes = [told] if unknown else []
        if empty := sum(not text.strip() for text in texts):
            told = f"without text: {empty} of {counted(len(texts), 'prompt')}"
            notes.append(f"{told}; what is measured is the unconditional text")
        return notes

    def token_tables(self, prompts: str | Sequence[str]) -> list[TokenTable]:
        """What each text position of these prompts is, without encoding them. `.truncated` names the words cut off.

        A reference that the text encoder is shown has one position here, and as many as it takes in `encode_prompt`.
        """
        texts = _texts(prompts)
        shown = [1] * len(self.references) * len(texts)
        return token_tables(self.pipeline, self.family, texts, self.max_sequence_length, pictures=shown)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> TextCondition:
        """Encode prompts as the stock pipeline does; the empty string is the unconditional text."""
        texts = _texts(prompts)
        names = [name for stream in self.family.streams for name in stream.encoders]
        encoders = [weight_state(getattr(self.pipeline, name, None)) for name in names]
        if encoders != self._encoders:  # another adapter, another precision, one is left out
            self._known.clear()
            self._encoders = encoders
        inputs, shown = self._call(texts, self.default_size)
        tokens = token_tables(self.pipeline, self.family, texts, self.max_sequence_length, pictures=shown)
        text, pooled = inputs[self.family.text_input], inputs.get(self.family.pooled_input)
        if not isinstance(text, Tensor):
            text = torch.nn.utils.rnn.pad_sequence(list(text), batch_first=True)
        return TextCondition(text, text.new_zeros(len(texts), 0) if pooled is None else pooled, tokens)

    @torch.no_grad()
    def encode_image(self, images: Any) -> Tensor:
        """Latents [B, C, h, w] float32 of images: the VAE's mean, shifted and scaled as the transformer expects.

        Args:
            images: a PIL image, a uint8 array [H, W, 3], or a list of either, all of one size.

        Raises:
            UserError: sizes differ or are no multiple of one token's side, or the model makes videos.
        """
        self.check_pictures()
        self._check_latents()
        arrays = [_rgb(image) for image in (images if isinstance(images, list | tuple) else [images])]
        sizes = sorted({array.shape[:2] for array in arrays})
        if len(sizes) > 1:
            raise UserError(f"images of one batch must have one size; found {sizes}")
        if any(side % self.size_multiple for side in sizes[0]):
            raise UserError(
                f"image of {sizes[0][0]} x {sizes[0][1]} pixels: both sides must be multiples of {self.size_multiple}"
            )
        self._check_vae()
        vae = self.pipeline.vae
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device, vae.dtype) / 127.5 - 1.0
        return packing.encode(vae, pixels, self.family.cell)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """PIL images of latents [B, C, h, w]."""
        self._check_latents()
        self._check_vae()
        pixels = packing.decode(self.pipeline.vae, _batch_of(latents).to(self.device), self.family.cell)
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")

    def noise(self, latents: Tensor, sigma: float | Sequence[float], seed: int | Sequence[int] = 0) -> Tensor:
        """Noised latents (1 - sigma) x + sigma n, [B, C, h, w] float32.

        Args:
            latents: clean latents [B, C, h, w].
            sigma: noise level in 0..1, one or one per sample.
            seed: one seed per sample, or an int for seeds seed, seed + 1, ...

        A sample's noise depends on its own seed alone, not on the batch it is in, nor on the device.
        """
        draws = [
            torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(s))
            for s in seed_values(seed, len(_batch_of(latents)))
        ]
        levels = torch.tensor(_per_row(sigma, len(latents)), device=latents.device)[:, None, None, None]
        return (1.0 - levels) * latents.float() + levels * torch.stack(draws).to(latents.device)

    def denoise(
        self,
        latents: Tensor,
        sigma: float | Sequence[float],
        text: TextCondition,
        *,
        seeds: int | Sequence[int] = -1,
        branch: str = "cond",
        step: int = 0,
        grad: bool = False,
    ) -> Tensor:
        """One transformer call: the velocity n - x at noised latents, [B, C, h, w] float32.

        Args:
            latents: noised latents [B, C, h, w].
            sigma: noise level in 0..1, one or one per sample.
            text: B prompts, or one for all samples.
            seeds, branch, step: labels for the tables of a probe; the call itself does not depend on them.
            grad: keep gradients.
        """
        count = len(_batch_of(latents))
        if not isinstance(text, TextCondition):
            raise UserError(f"text {brief(text)}: expected what `encode_prompt` gives")
        if len(text) not in (1, count):
            found = f"{counted(len(text), 'prompt')} for {counted(count, 'latent')}"
            raise UserError(f"{found}; expected one prompt, or one per sample")
        tokens = text.tokens * (count // len(text))
        levels = _per_row(sigma, count)
        labels = [-1] * count if seeds == -1 else seed_values(seeds, count)
        batch = Batch(tokens, [table.prompt for table in tokens], labels, [branch] * count, levels, step)
        inputs = self.inputs(latents, torch.tensor(levels), text)
        with self._labelled(batch), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return self.velocity(self.transformer(**inputs, return_dict=False)[0], latents)

    def inputs(self, latents: Tensor, sigmas: Tensor, text: TextCondition) -> dict[str, Any]:
        """Arguments of the transformer's forward for latents [B, C, h, w] at noise levels [B]; see `denoise`."""
        family, repeat, device, dtype = self.family, len(latents) // len(text), self.device, self.dtype
        height, width = (int(side) * self.latent_side for side in latents.shape[-2:])
        prompts = [table.prompt for table in text.tokens] * repeat
        if family.fixed_length:
            # Nothing but the text itself depends on the prompts, where there is no mask of theirs, and no other input
            # of text (HiDream's Llama): encode none again.
            blank, _ = self._call([""] * len(latents), (height, width))
            further = blank.keys() - {family.text_input}
            kept = any("mask" in name or name.startswith("encoder_") for name in further)
            prompts = prompts if kept else [""] * len(latents)
        inputs = dict(self._call(prompts, (height, width))[0])
        packed = packing.pack(latents.to(device, dtype), family.form, family.cell)
        found, own = (packing.channels(one, family.form) for one in (packed, inputs[family.image_input]))
        if found != own:
            each = own * latents.shape[1] / found
            raise UserError(f"latents of {latents.shape[1]} channels: expected {each:g}, as `encode_image` gives them")
        if self.references:
            packed = torch.cat([packed, inputs[family.image_input][:, packed.shape[1] :]], 1)
        inputs[family.image_input] = packed
        inputs[family.timestep_input] = family.timestep(sigmas.to(device))
        if isinstance(inputs[family.text_input], Tensor):
            inputs[family.text_input] = torch.cat([text.prompt_embeds.to(device, dtype)] * repeat)
        if family.pooled_input in inputs:
            inputs[family.pooled_input] = text.pooled.to(device, dtype).repeat(repeat, 1)
        return inputs

    def velocity(self, output: Any, latents: Tensor) -> Tensor:
        """The velocity n - x, [B, C, h, w] float32, of a transformer's output for these latents."""
        family = self.family
        h, w = latents.shape[-2:]
        if self.references:  # some transformers give these back too
            output = output[:, : h * w // family.cell**2]
        found = packing.unpack(output, family.form, family.cell, (h, w)).float()
        return -found if family.towards_image else found

    def _check_latents(self) -> None:
        """Raises a UserError where only the stock pipeline puts latents into the transformer."""
        if self.family.form == "joined":
            raise UserError(
                f"{type(self.pipeline).__name__} puts image and text into one input of its transformer: sample with"
                " the pipeline, or give it to `probe`"
            )

    def _check_vae(self, instead: str = "") -> None:
        """Raises a UserError where the pipeline was loaded without its autoencoder."""
        if getattr(self.pipeline, "vae", self) is None:
            raise UserError(
                f"{type(self.pipeline).__name__} has no autoencoder (vae=None), so latents make no picture, and no"
                f" picture latents{instead}"
            )

    def _check_call(self, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Refuse options of a call that the pipeline has not, that `generate` sets by itself (the arguments), or that
        ask for pictures without an autoencoder; and a negative prompt that would not be read."""
        known = inspect.signature(type(self.pipeline).__call__).parameters
        for name in options:
            if name in arguments or name == "prompt":
                raise UserError(
                    f"generate sets {name!r} by itself, from its prompts, steps, guidance, seed and the others"
                )
            if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in known.values()):
                check_known("option of the pipeline", name, list(known)[1:])
        twofold = float(options.get("true_cfg_scale", 1.0)) > 1.0 or "true_cfg_scale" in arguments
        if any(arguments.get("negative_prompt", ())) and "true_cfg_scale" in known and not twofold:
            raise UserError(
                f"{type(self.pipeline).__name__} reads a negative prompt with true_cfg_scale above 1 only: give that,"
                " too, or leave it out"
            )
        if options.get("output_type") != "latent":
            self._check_vae('; ask for output_type="latent"')

    @torch.no_grad()
    def _call(self, prompts: Sequence[str], size: tuple[int, int]) -> tuple[dict[str, Any], list[int]]:
        """What the stock pipeline calls its transformer with for prompts, without guidance, at (height, width), and how
        many text positions each picture takes that its text encoder is shown."""
        self._check_latents()
        if len(prompts) > 1 and self.references and self.family.reads_pictures:
            raise UserError(
                f"{type(self.pipeline).__name__} takes one prompt at a time beside pictures, and {len(prompts)} are"
                " given: take them one by one (batch 1)"
            )
        if "FlowMatch" not in type(self.scheduler).__name__:
            raise UserError(
                f"{type(self.scheduler).__name__} is no rectified flow: sample with the pipeline, or give it to `probe`"
            )
        pictures = tuple((picture.size, hash(picture.tobytes())) for picture in self.references)
        key = (tuple(prompts), size, self.max_sequence_length, pictures)
        if key not in self._known:
            while len(self._known) >= _REMEMBERED:
                self._known.pop(next(iter(self._known)))
            shown: list[int] = []

            def listen(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                shown[:] = picture_positions(self.pipeline, kwargs.get("image"))
                return proceed(*args, **kwargs)

            detach = interpose(self.pipeline, "encode_prompt", listen) if pictures else lambda: None
            try:
                inputs, scheduler = self._dry_run(prompts, _STEPS, height=size[0], width=size[1])
            finally:
                detach()
            self._check_references(inputs)
            if abs(1000.0 * float(scheduler.sigmas[1]) - float(scheduler.timesteps[1])) > 1.0:
                raise UserError(
                    f"{type(self.pipeline).__name__} gives its transformer timesteps that do not follow from the noise"
                    " level: sample with the pipeline, or give it to `probe`"
                )
            inputs.pop("return_dict", None)
            self._known[key] = inputs, shown
        return self._known[key]

    def _check_references(self, inputs: dict[str, Any]) -> None:
        if not self.references:
            return
        layout, _ = arranged(self.family.arrangement(inputs, unwrap(self.transformer).config))
        found = len(layout.references_of(0))
        if found != len(self.references) or self.family.form != "packed":
            made = f"{counted(found, 'reference')} of {counted(len(self.references), 'picture')}"
            raise UserError(
                f"{type(self.pipeline).__name__} made {made}, in {self.family.form};"
                " expected an editing pipeline that takes as many, with packed latents"
            )

    def _dry_run(self, prompts: Sequence[str], steps: int, **options: Any) -> tuple[dict[str, Any], Any]:
        """The first transformer call of a sampling run, and the scheduler as set for it; the model's own stays."""
        before = self.scheduler
        scheduler = self.pipeline.scheduler = copy.deepcopy(before)
        guidance = None if self.family.distilled else 1.0
        # A generator of its own: nobody else's random numbers are used up.
        generator = torch.Generator().manual_seed(0)
        options |= {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
        options["num_frames"] = self.num_frames
        try:
            with barless(self.pipeline):
                return first_call(self.pipeline, prompts, **self._arguments(guidance=guidance, **options)), scheduler
        finally:
            self.pipeline.scheduler = before

    def _arguments(self, *, guidance: float | None, length: int | None = None, **options: Any) -> dict[str, Any]:
        """Arguments of the stock pipeline by its own names, as far as it takes them; its own defaults for None, but for
        what the family sets, and the sides of a picture or video that goes by no other: those that the model was made
        for, which are not the default of all pipelines (AuraFlow's is 1024)."""
        known = inspect.signature(type(self.pipeline).__call__).parameters
        own = {} if self.references else dict(zip(("height", "width"), self.default_size, strict=True))
        stated = {name: value for name, value in options.items() if value is not None}
        options = dict(self.family.options) | own | stated
        check_references(type(self.pipeline), self.family, len(self.references))
        if self.references:
            given = list(self.references) if len(self.references) > 1 else self.references[0]
            options.setdefault(self.family.reference_argument, given)
        if options.get("height") and options.get("width"):
            options["max_area"] = options["height"] * options["width"]  # Kontext scales any size to its own area
        length = self.max_sequence_length if length is None else length
        if length != self.own_length and self.family.length_argument not in known:
            raise UserError(f"{type(self.pipeline).__name__} takes no max_sequence_length; leave it out")
        options[self.family.length_argument] = length
        if guidance is not None:
            options[self.family.scale_argument] = max(0.0, guidance - self.family.scale_offset)
        return {name: value for name, value in options.items() if name in known}

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 28,
        guidance: float = 7.5,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        negative: str = "",
        max_sequence_length: int | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """Sample images, or videos, with the stock pipeline, without its progress bar.

        Args:
            prompts: one prompt or several; they run as one batch, except beside pictures that a text encoder is shown.
            steps: sampling steps. guidance: classifier-free guidance scale; at most 1 runs without it.
            seed: one per image, or an int for seeds seed, seed + 1, ...; the image depends on its own seed alone.
            height, width: pixels; `default_size` if None. A video has `num_frames` frames.
            negative: the unconditional text.
            max_sequence_length: as the attribute, for this call.
            num_images_per_prompt: images per prompt, consecutive in the result.
            options: passed to the pipeline as they are, e.g. `output_type="latent"`.

        Raises:
            UserError: values that cannot be, or options that the pipeline has not or that are set here.

        Returns: list of PIL images (of videos: of `results.clip.Clip`), or what `output_type` asks for.
        """
        texts, num_images_per_prompt = _texts(prompts), whole("num_images_per_prompt", num_images_per_prompt, 1)
        seeds = seed_values(seed, len(texts) * num_images_per_prompt)
        if len(texts) > 1 and self.references and self.family.reads_pictures:
            options |= {
                "steps": steps, "guidance": guidance, "height": height, "width": width, "negative": negative,
                "max_sequence_length": max_sequence_length, "num_images_per_prompt": num_images_per_prompt,
            }  # fmt: skip
            rows = np.reshape(seeds, (len(texts), -1)).tolist()
            return _joined([self.generate(text, seed=row, **options) for text, row in zip(texts, rows, strict=True)])
        guidance, steps = number("guidance", guidance), whole("steps", steps, 1)
        _text_or_refusal(negative)
        asked = {"height": height, "width": width, "max_sequence_length": max_sequence_length}
        height, width, length = (None if of is None else whole(name, of, 1) for name, of in asked.items())
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        own = self.size or (None, None)
        if self.makes_videos:  # some of their pipelines make one per prompt, whatever is asked for
            texts, num_images_per_prompt = [text for text in texts for _ in range(num_images_per_prompt)], 1
        arguments = self._arguments(
            guidance=guidance, length=length, num_inference_steps=steps, generator=generators,
            height=height or own[0], width=width or own[1], negative_prompt=[negative] * len(texts),
            num_images_per_prompt=num_images_per_prompt, num_frames=self.num_frames,
        )  # fmt: skip
        if negative and "negative_prompt" not in arguments:
            raise UserError(f"{type(self.pipeline).__name__} takes no negative prompt; leave it out")
        self._check_call(arguments, options)
        options |= {"output_type": "pil"} if self.makes_videos and "output_type" not in options else {}
        with _guided(self.pipeline, guidance), barless(self.pipeline), self._sized(arguments):
            made = self.pipeline(prompt=texts, **arguments, **options)
        if not self.makes_videos:
            self._tell_size(made.images, (arguments.get("height"), arguments.get("width")))
            return made.images
        return [Clip.of(frames) for frames in made.frames] if options["output_type"] == "pil" else made.frames

    @contextmanager
    def _sized(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Says which sizes there are where the pipeline refuses that of these arguments; others round it."""
        try:
            yield
        except ValueError as error:
            sides = [arguments.get(name) or 0 for name in ("height", "width")]
            if any(side % self.size_multiple for side in sides):
                raise UserError(
                    f"{sides[0]} x {sides[1]} pixels (height x width): {type(self.pipeline).__name__} makes sides that"
                    f" are multiples of {self.size_multiple} ({str(error).rstrip('.')})"
                ) from error
            raise

    def _tell_size(self, pictures: Any, asked: tuple[int | None, int | None]) -> None:
        """Warn where pictures (PIL) have not the (height, width) that the pipeline was asked for."""
        found = next(((p.height, p.width) for p in pictures if isinstance(p, Image.Image)), asked)
        if None not in asked and found != asked:
            made, wanted = (f"{height} x {width}" for height, width in (found, asked))
            warnings.warn(
                f"{type(self.pipeline).__name__} made {made} pixels (height x width) where {wanted} were asked for",
                ProbeWarning,
                stacklevel=3,
            )

    def sigmas(self, steps: int, size: tuple[int, int] | None = None) -> list[float]:
        """The noise level at which each of `steps` sampling steps calls the transformer, from noise to image.

        Args:
            size: (height, width) in pixels, on which it depends in some families; the model's own if None.
        """
        steps = whole("steps", steps, 1)
        try:
            height, width = (whole("height and width", side, 1) for side in size or self.default_size)
        except (TypeError, ValueError):
            raise UserError(f"size {brief(size)}: expected (height, width) in pixels") from None
        with torch.no_grad(), self._sized({"height": height, "width": width}):
            _, scheduler = self._dry_run([""], steps, height=height, width=width)
        return self.family.levels(scheduler)[:steps]

    @contextmanager
    def _labelled(self, batch: Batch) -> Iterator[None]:
        before, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = before


def check_references(pipeline: type, family: Family, count: int) -> None:
    """Whether the call of a pipeline's class takes so many pictures beside the prompt.

    Raises:
        UserError: it takes none, edits or begins with one, or makes its videos from one only.
    """
    name = pipeline.__name__
    argument = inspect.signature(pipeline.__call__).parameters.get(family.reference_argument)
    if argument is None and count:
        raise UserError(f"{name} takes no pictures beside the prompt: leave the references out")
    needed = argument is not None and argument.default is argument.empty
    if (needed or name in family.editing) and not count:
        what = "edits a picture" if name in family.editing else "begins with a picture"
        raise UserError(f"{name} {what}: give it one as reference (--references FILE, or model.given([picture]))")
    if family.video_size is not None and count > 1:
        raise UserError(f"{name} makes a video of one picture; {count} references are given")


def is_embedded(pipeline: Any) -> bool:
    """Whether a pipeline was loaded from the checkpoints that ship."""
    source = getattr(pipeline.config, "_name_or_path", None)
    return bool(source) and assets.folder().resolve() in Path(str(source)).resolve().parents


def default_length(pipeline: Any, family: Family) -> int:
    """The family's default text length, or less if a tokenizer of such a stream says so."""
    lengths = [family.default_length] if family.default_length else []
    for stream in family.streams:
        if stream.length == family.length_argument:
            tokenizers = (getattr(pipeline, name, None) for name in stream.tokenizers)
            lengths += [int(tokenizer.model_max_length) for tokenizer in tokenizers if tokenizer is not None]
    return min(lengths, default=0)


def _own_frames(pipeline: Any) -> int:
    """Frames of the videos that a pipeline makes: the default of its argument, or what the transformer was made for."""
    stated = inspect.signature(type(pipeline).__call__).parameters.get("num_frames")
    default: Any = None if stated is None else stated.default
    return int(default or getattr(pipeline.transformer.config, "sample_frames", 1))


@contextmanager
def _guided(pipeline: Any, scale: float) -> Iterator[None]:
    """The scale of guidance of a pipeline that has objects for it in place of an argument."""
    given = [getattr(pipeline, name, None) for name in ("guider", "ocr_guider")]
    guiders = [guider for guider in given if guider is not None]
    before = [guider.guidance_scale for guider in guiders]
    try:
        for guider in guiders:
            guider.guidance_scale = max(1.0, scale)
        yield
    finally:
        for guider, kept in zip(guiders, before, strict=True):
            guider.guidance_scale = kept


def _joined(made: Sequence[Any]) -> Any:
    """Lists, arrays or tensors of pictures, one after the other."""
    if isinstance(made[0], Tensor):
        return torch.cat(list(made))
    return np.concatenate(made) if isinstance(made[0], np.ndarray) else list(chain.from_iterable(made))


def _texts(prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"prompts are {prompts!r}; expected a text, or one text or more in a list")
    return list(texts)


def _text_or_refusal(negative: object) -> None:
    if not isinstance(negative, str):
        raise UserError(f"negative {brief(negative)}: expected a text")


def _batch_of(latents: Any) -> Tensor:
    """The latents, which are a batch of samples."""
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not len(latents):
        shape = f"of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else brief(latents)
        raise UserError(f"latents {shape}: expected a tensor [samples, channels, height, width]")
    return latents


def _per_row(value: float | Sequence[float], count: int) -> list[float]:
    """One noise level per sample."""
    given: Any = value
    given = given.tolist() if hasattr(given, "tolist") else given  # of numpy or torch
    several = isinstance(given, Sequence) and not isinstance(given, str)
    rows = [number("sigma", row, 0, 1) for row in (given if several else [given] * count)]
    if len(rows) != count:
        found = f"sigma {value!r} for {counted(count, 'sample')}"
        raise UserError(f"{found}: expected one number in 0..1, or one per sample")
    return rows


def _rgb(image: Any) -> np.ndarray:
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"image of shape {array.shape} and type {array.dtype}: expected uint8 [height, width, 3]")
    return array
