"""Options that several experiments share, each stated once, and what they mean.

Mixed into an experiment as base classes; `--help`, the checks and a run's record are made from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mmdit_probe.data import Sample, prompts as read, samples, single
from mmdit_probe.data.prompt_sets import SETS
from mmdit_probe.data.sources import NAMES
from mmdit_probe.errors import UserError, counted
from mmdit_probe.experiments.store import PICTURES
from mmdit_probe.experiments.target import LAYERS
from mmdit_probe.options import Option, changed
from mmdit_probe.results.clip import Clip, check_video_file
from mmdit_probe.results.selection import LayerSelection, load_selection
from mmdit_probe.specs import HeadSpec, Spec, check_spec, head_indices, heads_at, layer_indices, listed, named_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmdit_probe.edit.edit import Edit
    from mmdit_probe.experiments.progress import Progress
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.models.mmdit import MMDiT

INPUT, MODEL, OUTPUT, DETAIL = "Input", "Model", "Output", "Model: memory, text, size"
"""Headings of the options in `--help`, beside `options.METHOD`."""

Input, Output = partial(Option, panel=INPUT), partial(Option, panel=OUTPUT)
"""Options under these headings."""


@dataclass(frozen=True, kw_only=True)
class LayersAndHeads:
    """Layers and heads, named or selected."""

    layers: Annotated[Spec, Option("Joint-attention layers, 0-based: all, 4, 2-5 or 0,4.")] = "all"
    heads: Annotated[HeadSpec, Option("Attention heads: all, 3, 0-3 or 0,2.")] = "all"
    selection: Annotated[
        Path | str | None, Option("Layers and heads from select-layers, in place of --layers and --heads.")
    ] = None

    def places(self, model: MMDiT) -> tuple[tuple[int, ...], HeadSpec]:
        """Layers and heads of a model: indices, and a specification for all layers or layer -> heads.

        Raises:
            UserError: they do not exist, or the selection is not one or is of other weights.
        """
        if self.selection is None:
            layers = layer_indices(self.layers, len(model.layers))
            return layers, checked_heads(self.heads, layers, model.heads)
        return selected_places(self.selection, model)


def check_places(asked: Any) -> None:
    """The layers and heads that options name are specifications, and none are named beside a selection of both.

    Raises:
        UserError: they are not.
    """
    if getattr(asked, "selection", None) is not None and changed(asked, "layers", "heads"):
        raise UserError("--selection names layers and heads already; leave --layers and --heads out")
    for name in LAYERS:
        if (layers := getattr(asked, name, None)) is not None:
            check_spec(layers, layer_indices)
    heads = getattr(asked, "heads", None)
    if heads is not None and not isinstance(heads, Mapping):
        check_spec(heads, head_indices)


def checked_heads(heads: HeadSpec, layers: Sequence[int], count: int) -> HeadSpec:
    """Heads as indices: of all layers, or layer -> heads.

    Raises:
        UserError: they do not exist, or are named for a layer that is not read.
    """
    if isinstance(heads, Mapping):
        unread = next((layer for layer in heads if layer not in layers), None)
        if unread is not None:
            raise UserError(f"heads are named of layer {unread!r}; read are layers {', '.join(map(str, layers))}")
        return {layer: heads_at(heads, layer, count) for layer in layers}
    return heads_at(heads, -1, count)


def selected_places(selection: Path | str | LayerSelection, model: MMDiT) -> tuple[tuple[int, ...], HeadSpec]:
    """Layers and heads of a selection made on this model."""
    found = load_selection(selection, model)
    chosen = tuple(sorted(found.layers))
    heads = {layer: tuple(found.heads[layer]) for layer in chosen if layer in found.heads}
    return chosen, checked_heads(heads or "all", chosen, model.heads)


def sources_of(options: Mapping[str, Any], scenes: bool) -> list[str]:
    """What is measured on, by the options of a command: its pictures, prompts, data set or split of scenes, by name.

    Args:
        scenes: whether the model knows the scenes world, which is read where nothing is named.
    """
    given = [options.get(name) for name in ("images", "prompts", "dataset")]
    named = [str(one) for of in given if of is not None for one in (of if isinstance(of, list | tuple) else [of])]
    if "split" in options:
        named.append(f"scenes:{options['split']}")
    sampled = "num_steps" in options  # else prompts are the pictures' texts
    unnamed = given[0] is None and "prompts" in options and (given[1] is None or not sampled)
    named += ["scenes:val"] * (scenes and unnamed)
    return ["scenes:val" if one in ("scenes", "scenes:") else one for one in named]


def shared(first: Sequence[str], second: Sequence[str]) -> str:
    """The first of some sources that has something in common with others, by their names; "" where none has."""
    pairs = ((one, other) for one in first for other in second)
    return next((one for one, other in pairs if f"{one}:".startswith(f"{other}:") or other.startswith(f"{one}:")), "")


Prompts = Annotated[
    str | Sequence[str] | None,
    Input("File with one prompt per line, a text, or a set: everyday, scenes:train|val|test (50 prompts).",
          shown_default="scenes:val for embedded models, else everyday", values=SETS),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled."""

    num_steps: Annotated[int, Option("Number of sampling steps.", min=1, max=1000)] = 28
    guidance: Annotated[
        float, Option("Classifier-free guidance scale; 1 or less runs without it.", min=0, max=1000)
    ] = 7.5


SAMPLED = ("num_steps", "guidance")
"""Options of `Sampling`: pictures at hand have none."""


@dataclass(frozen=True, kw_only=True)
class Filmed:
    """How videos are written, of models that make them."""

    video: Annotated[Literal["gif", "mp4"], Output("File of videos: gif, or mp4 (with imageio-ffmpeg).")] = "gif"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        check_video_file(self.video)

    def write_videos(self, result: Result, folder: Path) -> None:
        """The videos that a run kept, beside their frames."""
        for name in result.store.picture_names():
            if (folder / PICTURES / name).is_dir() and isinstance(clip := result.store.load_picture(name), Clip):
                clip.save(folder / PICTURES / f"{name}.{self.video}")


def prompts_of(prompts: str | Sequence[str] | None, limit: int | None, scenes: bool, default: int) -> list[str]:
    """The prompts to sample: what was asked for, else captions of `default` held-out scenes or the everyday set."""
    if prompts is not None and not isinstance(prompts, str):
        asked = list(prompts)[:limit]
        if not asked:
            raise UserError("no prompt is given; expected one or more")
        return asked
    source = ("scenes:val" if scenes else "everyday") if prompts is None else prompts
    return read(source, default if limit is None and prompts is None else limit)


@dataclass(frozen=True, kw_only=True)
class Referring:
    """Pictures that an editing model is given beside the prompt."""

    references: Annotated[
        Any, Input("Pictures that an editing model is given: files by comma, a folder, or scenes:val:3.", values=NAMES)
    ] = None

    def load(self, target: Any, shown: Progress) -> Any:
        from mmdit_probe.experiments.target import as_model

        given = self.pictures_given()
        model = as_model(target, shown, len(given))
        return model.given(given) if given else model

    def pictures_given(self) -> list[Image]:
        """The pictures (PIL).

        Raises:
            UserError: one cannot be read.
        """
        from PIL.Image import fromarray

        asked = self.references
        if asked is None:
            return []
        if isinstance(asked, str) and "," in asked and not os.path.exists(asked):
            asked = [part.strip() for part in asked.split(",")]
        given = asked if isinstance(asked, str | Path | list | tuple) else [asked]
        return [fromarray(one.image) for one in samples_of(given, None)]


@dataclass(frozen=True, kw_only=True)
class OverReference(Referring):
    """Maps over the picture, or over one of the references."""

    over: Annotated[
        int | None, Option("Maps over this one of --references, from 0.", min=0, shown_default="over the picture")
    ] = None

    def requested_over(self, model: MMDiT) -> dict[str, int]:
        """What a request says of it; nothing of maps over the picture.

        Raises:
            UserError: the model is given no such reference.
        """
        if self.over is None:
            return {}
        if self.over >= len(model.references):
            raise UserError(f"no reference {self.over}: {len(model.references)} are given (the first is 0)")
        return {"over": self.over}


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """Pictures that are encoded, noised and denoised once, each with a text."""

    images: Annotated[
        str | Path | Sequence[Any] | None,
        Input(
            "Pictures: a folder, a file, or scenes:train|val|test.",
            shown_default="scenes:val for embedded models",
            values=NAMES,
        ),
    ] = None
    prompts: Annotated[
        str | Sequence[str] | None,
        Input(
            "A text for all pictures, or a file with one per line and picture.",
            shown_default="their captions",
            values=SETS,
        ),
    ] = None
    limit: Annotated[
        int | None,
        Input("Use the first LIMIT pictures.", min=1, shown_default="{0.default_pictures}, or all of --images"),
    ] = None
    sigma: Annotated[float, Option("Noise level, 0 clean to 1 noise (the paper's t=8: 0.515).", min=0, max=1)] = 0.515

    default_pictures: ClassVar[int]

    def gather(self, scenes: bool) -> list[Sample]:
        """The pictures to probe.

        Raises:
            UserError: none are named, and the model does not know the scenes world.
        """
        if self.images is None and not scenes:
            raise UserError("no pictures are given; name a folder with --images")
        source = "scenes:val" if self.images is None else self.images
        return samples_of(source, self.default_pictures if self.limit is None and self.images is None else self.limit)

    def texts(self, pictures: Sequence[Sample], seed: int) -> tuple[list[str], dict[str, Any]]:
        """The text of each picture, and what a request says of both; picture k has seed + k."""
        texts = captions_of(self.prompts, pictures)
        pairs = enumerate(zip(pictures, texts, strict=True))
        return texts, {"sigma": self.sigma, "items": [[one.fingerprint(), text, seed + k] for k, (one, text) in pairs]}


def samples_of(source: str | Path | Sequence[Any], limit: int | None) -> list[Sample]:
    """Pictures by source, or pictures at hand (samples, single files, PIL images, arrays)."""
    if isinstance(source, str | Path):
        found = samples(str(source), limit)
    else:
        found = [
            one if isinstance(one, Sample) else single(str(one)) if isinstance(one, str | Path)
            else Sample(f"picture {number}", one)
            for number, one in enumerate(list(source)[:limit])
        ]  # fmt: skip
    if not found:
        raise UserError("no picture is given; expected one or more")
    return found


def captions_of(prompts: str | Sequence[str] | None, pictures: Sequence[Sample]) -> list[str]:
    """Each picture's own caption, one text for all, or one per picture; a file and a set are read."""
    if prompts is None:
        return [picture.prompt for picture in pictures]
    texts = prompts_of(prompts, None, False, len(pictures))
    if len(texts) not in (1, len(pictures)):
        found = f"{counted(len(texts), 'prompt')} for {counted(len(pictures), 'picture')}"
        raise UserError(f"{found}; expected none, one, or one per picture")
    return texts * (len(pictures) // len(texts))


MOST_OPENED, ENLARGED = 64, 4
"""Of how many files the remarks tell what becomes of them, and from which factor on they call a picture enlarged."""


def notes_on(
    model: MMDiT, pictures: Sequence[Sample], texts: Sequence[str] = (), size: tuple[int, int] | None = None
) -> list[str]:
    """Remarks on pictures and the texts they are read with: files that a model of drawn scenes cannot know, the empty
    prompt where there is no caption, and what becomes of files that are cropped to `size` (height, width) in pixels."""
    notes = [] if size is None else list(_notes_on_files(pictures, size))
    if model.vocabulary and any(picture.is_file for picture in pictures):
        notes.append(f"{model.name} was trained on drawn scenes alone: what it finds in other pictures means nothing")
    if bare := sum(not text for text in texts):
        told = f"no caption: {bare} of {counted(len(texts), 'picture')}"
        notes.append(f"{told}; the empty prompt was used, --prompts gives another")
    return notes


def _notes_on_files(pictures: Sequence[Sample], size: tuple[int, int]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for one in [picture for picture in pictures if picture.is_file][:MOST_OPENED]:
        width, height = one.open().size
        said = list(one.notes)
        if ENLARGED * min(height, width) <= min(size):
            said.append(f"{height} x {width} pixels are enlarged to {size[0]} x {size[1]}")
        if abs(height * size[1] - width * size[0]) > 0.02 * height * size[1]:
            said.append("what lies beside the centre is cut off")
        for note in said:
            found.setdefault(note, []).append(one.name)
    for note, names in found.items():
        yield f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}"


Control = Annotated[
    str,
    Option(
        "Also measure controls, by comma: random (the same network, random weights), shuffled (another item's caption),"
        " uniform (uniform attention); or none.",
        values=("none", "random", "shuffled", "uniform"),
    ),
]
EditControl = Annotated[
    str,
    Option(
        "Controls by comma: budget (a coherent change of equal size), noise (a random one), random (the same edits on"
        " random weights), shuffled (images against another caption), uniform (under uniform attention); or none.",
        values=("none", "budget", "noise", "random", "shuffled", "uniform"),
    ),
]


@dataclass(frozen=True, kw_only=True)
class Edited:
    """How the I2T block is edited, or what the image reads of the references."""

    edit: Annotated[
        Literal["blur", "grid-blur", "zero", "mean"],
        Option("blur along text tokens (the paper), grid-blur, zero, mean."),
    ] = "blur"
    key: Annotated[
        Literal["text", "reference"],
        Option("Keys that are edited: text, or the tokens of --references, each picture on its grid."),
    ] = "text"
    blur_sigma: Annotated[float, Option("Blur width in tokens; 0 is the no-op.", min=0, max=1e6)] = 9.0
    kernel: Annotated[int, Option("Taps of the blur, odd.", min=1, max=9999)] = 5
    border: Annotated[
        Literal["reflect", "symmetric", "replicate"],
        Option("reflect (the paper), symmetric (keeps mass) or replicate."),
    ] = "reflect"
    where: Annotated[Literal["probabilities", "logits"], Option("Blur probabilities (the paper) or logits.")] = (
        "probabilities"
    )
    streams: Annotated[str | None, Option("Text tokens of these encoders only, e.g. clip.", shown_default="all")] = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.kernel % 2 == 0:
            raise UserError(f"--kernel is {self.kernel}; expected an odd number of taps")
        unread = changed(self, "blur_sigma", "kernel", "border", "where")
        if self.edit in ("zero", "mean") and unread:
            raise UserError(f"{unread} is of blurs; with --edit {self.edit} leave it out")
        if self.key == "reference" and self.streams:
            raise UserError("--streams selects text keys; with --key reference leave it out")

    def change(
        self, *, renormalise: bool = False, steps: Spec = "all", branches: tuple[str, ...] | None = None
    ) -> Edit:
        """The edit that the options describe; its layers are set later."""
        from mmdit_probe.edit import Blur, GridBlur, Mean, Scale

        address: dict[str, Any] = {
            "streams": streams_of(self.streams),
            "renormalise": renormalise,
            "steps": steps,
            "branches": branches,
        }
        if self.edit == "zero":
            return Scale("image", self.key, factor=0.0, **address)
        if self.edit == "mean":
            return Mean("image", self.key, **address)
        blur = Blur if self.edit == "blur" else GridBlur
        return blur(
            "image",
            self.key,
            sigma=self.blur_sigma,
            kernel=self.kernel,
            border=self.border,
            where=self.where,
            **address,
        )


def streams_of(streams: str | None) -> tuple[str, ...] | None:
    """The encoder streams that are named, by comma; None: all."""
    return None if streams is None else tuple(listed(streams))


def check_streams(model: MMDiT, streams: str | None) -> None:
    """Encoder streams exist.

    Raises:
        UserError: one does not.
    """
    known = dict.fromkeys(model.token_tables([""])[0].streams)
    named_of("encoder stream", streams_of(streams) or (), known)
