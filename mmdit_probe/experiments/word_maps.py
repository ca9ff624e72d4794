"""WordMaps: where the image looks for each word, as heat maps over the picture.

    from mmdit_probe import word_maps
    maps = word_maps(pipe, "a cat by the window", seed=0)     # one's own pipeline, an MMDiT, or a name
    maps["cat"].overlay(); maps["cat"].array; maps.sheet(); maps.explore()

    result = WordMaps(prompt="a red ring on grass", words="ring, grass").run("scenes-sd3")

A map is the exact I2T attention of every image query to the word's tokens (summed over its tokens and encoders),
averaged over heads, layers and sampling steps; of a video there is one per frame of the model. Maps show where a word
is looked for, not what it causes (`attribute`).
Not here: the observer (`observe.maps`), the page with all layers, heads and steps (`experiments.explore`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import numpy as np

from mmdit_probe.errors import check_known, counted
from mmdit_probe.experiments.experiment import Study
from mmdit_probe.experiments.explore import Explore
from mmdit_probe.experiments.options import Filmed, OverReference, checked_heads, streams_of
from mmdit_probe.experiments.pictured_words import PicturedPrompt, Pictures, grounding
from mmdit_probe.experiments.progress import Progress
from mmdit_probe.experiments.target import as_model
from mmdit_probe.experiments.text import Text, TextTable
from mmdit_probe.options import Option, described
from mmdit_probe.results import atomic
from mmdit_probe.results.clip import Clip
from mmdit_probe.specs import HeadSpec, Spec, step_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.plots.overlay import PictureMaps


@dataclass(frozen=True, kw_only=True)
class WordMaps(OverReference, Filmed, Pictures):
    """Heat maps of a prompt's words over the picture: one overlay per word, a sheet of all, and the arrays. Of a model
    of videos the overlays are animated.
    """

    name = "maps"
    examples = (
        '"a red ring and a blue house on grass" --words "ring, house, grass"',
        '"a cat on a sofa" --images cat.jpg --model MODEL',
    )
    tables = ("maps",)

    layers: Annotated[
        Spec | None,
        Option(
            "Joint-attention layers, 0-based: 9, 7-11 or all.",
            shown_default="those known to ground words, else the middle third",
        ),
    ] = None
    heads: Annotated[HeadSpec, Option("Attention heads: all, 3, 0-3 or 0,2.")] = "all"
    steps: Annotated[Spec, Option("Sampling steps: all, 0,20, 0-4, last-8.")] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is None:
            step_indices(self.steps, self.num_steps)

    def places(self, model: MMDiT) -> dict[str, Any]:
        known = grounding(model, self.layers)
        layers = known.layers
        heads = checked_heads(self.heads, layers, model.heads)
        steps = [0] if self.images is not None else list(step_indices(self.steps, self.num_steps))
        shares = known.weights or (1.0 / len(layers),) * len(layers)
        weights = [share for _, share in sorted(zip(layers, shares, strict=True))]
        return {
            "layers": sorted(layers), "weights": weights, "why": known.source, "heads": heads, "steps": steps,
            **self.requested_over(model),
        }  # fmt: skip

    def measure(self, study: Study, task: PicturedPrompt, record: TaskRecord) -> None:
        from mmdit_probe.observe.maps import TextMaps

        request, whole = study.request, _every(study.request["heads"], study.model.heads)
        seen = TextMaps(
            task.words, heads="mean" if whole else "all", streams=streams_of(self.streams), reference=self.over
        )
        steps = "all" if task.picture else request["steps"]
        image = self.look(study.model, task, [seen], request["layers"], steps)
        heads = "all" if whole else request["heads"]
        found = np.stack(
            [
                sum(
                    share * seen.map(word, layers=layer, heads=heads)
                    for layer, share in zip(request["layers"], request["weights"], strict=True)
                )
                for word in task.words
            ]
        ).astype(np.float32)
        record.arrays(
            f"maps-{task.index:03d}", words=np.array(task.words), maps=found, steps=np.array(seen.steps, np.int32)
        )
        others = {one.index: self.look(study.model, one, [], request["layers"]) for one in task.beside}
        for index, picture in ({task.index: image} | others).items():
            record.picture(f"{index:03d}", picture if self.over is None else study.model.references[self.over])
        peaks = np.array([np.unravel_index(one.argmax(), one.shape) for one in found], np.int32)
        values = found.reshape(len(found), -1)
        places = ("peak_frame", "peak_row", "peak_column")[-peaks.shape[1] :]
        record.write(
            "maps",
            {"word": np.array(task.words, object), "mass": values.mean(1), "max": values.max(1),
             **dict(zip(places, peaks.T, strict=True))},
            item=task.index, prompt=task.prompt, seed=task.seed,
        )  # fmt: skip

    def maps(self, result: Result, explorer: Any = None) -> list[PictureMaps]:
        """What was found, per picture. `explorer`: function of an item's number that makes its page."""
        from mmdit_probe.plots.overlay import PictureMaps

        store, found = result.store, []
        for k, (prompt, seed, words, *_) in enumerate(result.request["items"]):
            kept = store.load_arrays(f"maps-{k:03d}") if words else {"words": (), "maps": ()}
            arrays = dict(zip(map(str, kept["words"]), kept["maps"], strict=True))
            page = None if explorer is None else lambda k=k: explorer(k)
            found.append(PictureMaps(store.load_picture(f"{k:03d}"), prompt, arrays, seed, self.about(result), page))
        return found

    def about(self, result: Result) -> str:
        """What was averaged over, in words."""
        request = result.request
        weighted = "; weighted" if len(set(request["weights"])) > 1 else ""
        why = f" ({request['why']}{weighted})" if request["why"] else ""
        layers = f"layer{'s' if len(request['layers']) > 1 else ''} {', '.join(map(str, request['layers']))}{why}"
        every = _every(request["heads"], result.data["model"]["heads"])
        heads = "all heads" if every else f"heads {request['heads']}"
        if self.images is not None:
            return f"{result.model_name}: {layers}, {heads}, sigma {self.sigma:g}"
        over = "" if self.over is None else f", over reference {self.over}"
        # Fewer than asked for where sampling begins later (img2img); runs of earlier versions do not tell.
        first = next(k for k, (_, _, words, *_) in enumerate(request["items"]) if words)
        ran = result.store.load_arrays(f"maps-{first:03d}").get("steps", request["steps"])
        return f"{result.model_name}: {layers}, {heads}, {len(ran)} of {counted(self.num_steps, 'step')}{over}"

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.overlay import maps_sheet

        pictures = self.maps(result)
        return {"maps": maps_sheet(pictures, title=pictures[0].prompt if len(pictures) == 1 else "")}

    def files(self, result: Result, folder: Path) -> None:
        self.write_videos(result, folder)
        for k, maps in enumerate(self.maps(result)):
            for number, (word, one) in enumerate(maps.items()):
                place = folder / "overlays" / f"{k:03d}-{number:02d}-{atomic.letters(word)}"
                shown = one.overlay()
                if isinstance(shown, Clip):
                    shown.save(place.with_suffix(f".{self.video}"))
                    continue
                with atomic.replacing(place.with_suffix(".png")) as temporary:
                    shown.save(temporary, format="PNG")

    def tell(self, result: Result) -> list[Text]:
        several = len(result.request["items"]) > 1
        places = [str(name) for name in result.table if str(name).startswith("peak_")]
        peak = f"peak ({', '.join(name.removeprefix('peak_') for name in places)})"
        table = TextTable([*(["picture"] if several else []), "word", "mass", "max", peak], left=("word",))
        for row in result.table.to_dict("records"):
            cells = [str(row["item"])] if several else []
            cells += [row["word"], f"{row['mass']:.4f}", f"{row['max']:.4f}"]
            table.add(*cells, ", ".join(str(row[name]) for name in places))
        return [
            table,
            f"mass: mean probability of the word as key of {'image' if self.over is None else 'reference'} queries;"
            " max: its largest, at the peak on the token grid.",
            f"{self.about(result)}.",
        ]

    def document(self, result: Result) -> dict[str, Any]:
        overlays = None if result.path is None else sorted((result.path / "overlays").glob("*.*"))
        return {"layers": result.request["layers"], "words": result.table, "overlays": overlays}


def _every(heads: Any, count: int) -> bool:
    """Whether these are all heads of every layer."""
    return not isinstance(heads, Mapping) and len(heads) == count


# More than one picture: of a list of prompts; and perhaps of these two options.
@overload
def word_maps(  # type: ignore[overload-overlap]
    target: Any, prompt: str | Sequence[str] | None = None, *, images_per_prompt: int, progress: bool = False,
    num_frames: int | None = None, **options: Any,
) -> PictureMaps | list[PictureMaps]: ...  # fmt: skip
@overload
def word_maps(  # type: ignore[overload-overlap]
    target: Any, prompt: str | Sequence[str] | None = None, *, images: Any, progress: bool = False,
    num_frames: int | None = None, **options: Any,
) -> PictureMaps | list[PictureMaps]: ...  # fmt: skip
@overload
def word_maps(
    target: Any, prompt: str, *, progress: bool = False, num_frames: int | None = None, **options: Any
) -> PictureMaps: ...
@overload
def word_maps(
    target: Any, prompt: Sequence[str], *, progress: bool = False, num_frames: int | None = None, **options: Any
) -> list[PictureMaps]: ...
def word_maps(
    target: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    progress: bool = False,
    num_frames: int | None = None,
    **options: Any,
) -> PictureMaps | list[PictureMaps]:
    """Heat maps of a prompt's words: the maps of one picture, or a list where several prompts or pictures are asked.

    Args:
        target: one's own stock pipeline, an `MMDiT`, or a name: an embedded model, a diffusers folder, a hub id.
        prompt: one or several; with `images` the photo's text.
        progress: whether to show it, on stderr. num_frames: of a video; the model's own if None.
        options: those of `WordMaps`: words, seed, images (a file, a PIL picture, an array, or several),
            images_per_prompt, layers, heads, steps, streams, num_steps, guidance, height, width, sigma, references (for
            an editing model: pictures or files) and over (the number of one of them: maps over it).

    Raises:
        UserError: a word that no prompt has, unknown or bad options, or no such model.
    """
    shown = Progress(quiet=not progress)
    for name in options:
        check_known("option of word_maps", name, [one.name for one in described(WordMaps)])
    experiment = WordMaps(prompt=prompt, **options)
    model = as_model(target, shown, len(experiment.pictures_given()))
    if num_frames is not None:  # of this call, and no more
        model = copy.copy(model)
        model.num_frames = num_frames
    result = experiment.run(model, progress=shown)
    items = result.request["items"]

    def explorer(number: int) -> Any:
        text, seed, words = items[number][:3]
        picture = None
        if experiment.images is not None:
            picture = experiment.gather(False)[1][number].open()
        shared = {
            name: getattr(experiment, name)
            for name in ("num_steps", "guidance", "height", "width", "streams", "sigma", "references")
        }
        page = Explore(prompt=[text], words=words, images=picture, seed=seed, layers=experiment.layers, **shared)
        return page.pages(page.run(model, progress=shown))[0]

    found = experiment.maps(result, explorer)
    several = len(found) > 1 or isinstance(prompt, list | tuple)
    return found if several else found[0]
