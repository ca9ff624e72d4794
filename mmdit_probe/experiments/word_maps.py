"""WordMaps: where the image looks for each word, as heat maps over the picture.

    from mmdit_probe import word_maps
    maps = word_maps(pipe, "a cat by the window", seed=0)     # one's own pipeline, an MMDiT, or a name
    maps["cat"].overlay(); maps["cat"].array; maps.sheet(); maps.explore()

    result = WordMaps(prompt="a red ring on grass", words="ring, grass").run("scenes-sd3")

A map is the exact I2T attention of every image query to the word's tokens (summed over its tokens and encoders),
averaged over heads, layers and sampling steps. Maps show where a word is looked for, not what it causes (`attribute`).
Not here: the observer (`observe.maps`), the page with all layers, heads and steps (`experiments.explore`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.experiments.experiment import Experiment, Study, request_of, scheduled
from mmdit_probe.experiments.options import INPUT, METHOD, Sampling, captions_of, checked_heads, prompts_of, samples_of
from mmdit_probe.experiments.text import TextTable
from mmdit_probe.experiments.token_rows import unread
from mmdit_probe.options import Option
from mmdit_probe.results import atomic
from mmdit_probe.specs import HeadSpec, Spec, layer_indices, step_indices

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from mmdit_probe.data import Sample
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import Recorder
    from mmdit_probe.experiments.text import Text
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.models.tokens import TokenTable
    from mmdit_probe.observe.observer import Observer
    from mmdit_probe.plots.overlay import PictureMaps

KNOWN_LAYERS: tuple[tuple[str, tuple[int, ...], str], ...] = (
    ("scenes-sd3", (3, 4, 1), "chosen by mIoU on training scenes, analyses/segmentation_choice.py"),
    ("stable-diffusion-3-medium", (9,), "arXiv:2509.18096"),
    ("stable-diffusion-3.5-medium", (9,), "arXiv:2509.18096"),
    ("flux.1-dev", (12, 17), "arXiv:2509.18096"),
)
"""Part of a model's name, the layers that ground words in it, and who says so."""


Side = Annotated[
    int | None, Option("Of the picture in pixels.", min=1, shown_default="the model's own", panel=METHOD)
]


@dataclass(frozen=True)
class Item:
    """One picture to make, or at hand."""

    index: int
    prompt: str
    seed: int
    words: tuple[str, ...]
    picture: Sample | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures(Sampling, Experiment):
    """Pictures of prompts, or photos with a text, and words of them: what maps and explore have in common."""

    prompt: Annotated[
        str | Sequence[str] | None,
        Option("What to draw, or the text of --image; also a file of prompts or a set.", argument=True, panel=INPUT),
    ] = None
    words: Annotated[
        str | Sequence[str] | None,
        Option("Words or phrases of the prompt, by comma.", shown_default="all of them", panel=INPUT),
    ] = None
    image: Annotated[
        Any, Option("A photo to read instead of drawing: a file, a folder, or scenes:val:3.", panel=INPUT)
    ] = None
    limit: Annotated[int | None, Option("Use the first LIMIT prompts or pictures.", min=1, panel=INPUT)] = None
    images_per_prompt: Annotated[int, Option("Pictures per prompt, each with a seed of its own.", min=1, panel=INPUT)] = 1
    height: Side = None
    width: Side = None
    stream: Annotated[
        str | None, Option("Tokens of this text encoder only, such as clip or t5.", shown_default="all", panel=METHOD)
    ] = None
    sigma: Annotated[
        float,
        Option("Noise level of --image, 0 clean to 1 noise (the paper's t=8: 0.515).", min=0, max=1, panel=METHOD),
    ] = 0.515

    def gather(self, scenes: bool) -> tuple[list[str], list[Sample]]:
        if self.prompt is None and self.image is None:
            raise UserError('no prompt is given; expected one, such as "a red ring and a blue house on grass"')
        if self.image is None:
            return prompts_of(self.prompt, self.limit, scenes, 1), []
        given = isinstance(self.image, str | Path | list | tuple)
        pictures = samples_of(self.image if given else [self.image], self.limit)
        texts = captions_of(self.prompt, pictures)
        missing = next((one.name for one, text in zip(pictures, texts, strict=True) if not text), None)
        if missing is not None:
            raise UserError(f"picture {missing!r} has no caption: give the text whose words are looked for in it")
        return texts, pictures

    def items(self, model: MMDiT, inputs: tuple[list[str], list[Sample]]) -> list[Item]:
        """What is to be looked at, each with the words that its prompt has.

        Raises:
            UserError: a word that no prompt has.
        """
        texts, pictures = inputs
        tables = model.token_tables(texts)
        if self.stream is not None and self.stream not in (known := dict.fromkeys(tables[0].streams)):
            raise unknown("encoder stream", self.stream, known)
        wanted = self.words.split(",") if isinstance(self.words, str) else self.words
        asked = None if wanted is None else list(dict.fromkeys(word.strip() for word in wanted if word.strip()))
        for word in asked or ():
            if not any(table.word_spans(word, missing_ok=True) for table in tables):
                tables[0].word_spans(word)  # says why
        chosen = [words_of(table, asked, self.stream) for table in tables]
        for table, words in zip(tables, chosen, strict=True):
            if not words:
                raise UserError(f"prompt {table.prompt!r} has none of the words asked for, or no word at all")
        count = 1 if pictures else self.images_per_prompt
        return [
            Item(k, texts[of], self.seed + k, chosen[of], pictures[of] if pictures else None)
            for k, of in enumerate(of for of in range(len(texts)) for _ in range(count))
        ]

    def prepare(self, model: MMDiT, inputs: tuple[list[str], list[Sample]]) -> Study:
        items = self.items(model, inputs)
        known = model.unknown_words_note(inputs[0])
        notes = [*([known] if known else []), *(line for t in model.token_tables(inputs[0]) for line in unread(t))]
        how: dict[str, Any] = {"stream": self.stream, "height": self.height, "width": self.width}
        how |= {"sigma": self.sigma} if inputs[1] else {"num_steps": self.num_steps, "guidance": self.guidance}
        request = request_of(
            model,
            items=[
                [item.prompt, item.seed, list(item.words), *([item.picture.fingerprint()] if item.picture else [])]
                for item in items
            ],
            **how,
            **self.places(model),
        )
        facts: dict[str, Any] = {"remarks": notes}
        facts |= {"sigmas": [self.sigma]} if inputs[1] else scheduled(model, self.num_steps)
        return Study(model, request, items, "pictures", facts=facts, notes=notes)

    def places(self, model: MMDiT) -> dict[str, Any]:
        """Layers, steps and heads that are looked at, for the request."""
        raise NotImplementedError

    def look(self, model: MMDiT, item: Item, observers: Sequence[Observer], layers: Spec, steps: Spec = "all") -> Image:
        """Make the picture, or read it, while observers look."""
        from mmdit_probe.observe.probe import probe

        if item.picture is None:
            with probe(model, *observers, layers=layers, steps=steps):
                found: Image = model.generate(
                    item.prompt, steps=self.num_steps, guidance=self.guidance, seed=item.seed, height=self.height,
                    width=self.width,
                )[0]  # fmt: skip
            return found
        height, width = model.default_size
        picture = item.picture.open((self.height or height, self.width or width))
        latents = model.noise(model.encode_image(picture), self.sigma, item.seed)
        with probe(model, *observers, layers=layers):
            model.denoise(latents, self.sigma, model.encode_prompt([item.prompt]), seeds=item.seed)
        return picture


@dataclass(frozen=True, kw_only=True)
class WordMaps(Pictures):
    """Heat maps of a prompt's words over the picture: one overlay per word, a sheet of all, and the arrays.

    mmdit-probe maps "a red ring and a blue house on grass" --words "ring, house, grass"
    """

    name: ClassVar[str] = "maps"
    tables: ClassVar[tuple[str, ...]] = ("maps",)

    layers: Annotated[
        Spec | None,
        Option(
            "Joint-attention layers, 0-based: 9, 7-11 or all.", panel=METHOD,
            shown_default="those known to ground words, else the middle third",
        ),
    ] = None  # fmt: skip
    heads: Annotated[HeadSpec, Option("Attention heads: all, 3, 0-3 or 0,2.", panel=METHOD)] = "all"
    steps: Annotated[Spec, Option("Sampling steps: all, 0,20, 0-4, last-8.", panel=METHOD)] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is None:
            step_indices(self.steps, self.num_steps)

    def places(self, model: MMDiT) -> dict[str, Any]:
        layers, why = (
            (layer_indices(self.layers, len(model.layers)), "") if self.layers is not None else grounding(model)
        )
        heads = checked_heads(self.heads, layers, model.heads)
        steps = [0] if self.image is not None else list(step_indices(self.steps, self.num_steps))
        return {"layers": sorted(layers), "why": why, "heads": heads, "steps": steps}

    def measure(self, study: Study, task: Item, record: Recorder) -> None:
        from mmdit_probe.observe.maps import TextMaps

        request, whole = study.request, len(study.request["heads"]) == study.model.heads
        seen = TextMaps(task.words, heads="mean" if whole else "all", stream=self.stream)
        steps = "all" if task.picture else request["steps"]
        image = self.look(study.model, task, [seen], request["layers"], steps)
        heads = "all" if whole else request["heads"]
        found = np.stack([seen.map(word, heads=heads) for word in task.words])
        record.arrays(f"maps-{task.index:03d}", words=np.array(task.words), maps=found)
        record.picture(f"{task.index:03d}", image)
        peaks = [np.unravel_index(one.argmax(), one.shape) for one in found]
        rows, columns = (np.array([peak[axis] for peak in peaks], np.int32) for axis in (0, 1))
        record.write(
            "maps",
            {"word": np.array(task.words, object), "mass": found.mean((1, 2)), "max": found.max((1, 2)),
             "peak_row": rows, "peak_column": columns},
            item=task.index, prompt=task.prompt, seed=task.seed,
        )  # fmt: skip

    def summarise(self, result: Result) -> pd.DataFrame:
        return result.table

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {"maps": result.table}

    def maps(self, result: Result, explorer: Any = None) -> list[PictureMaps]:
        """What was found, per picture. `explorer`: function of an item's number that makes its page."""
        from mmdit_probe.plots.overlay import PictureMaps

        pictures, found = result.store.pictures(), []
        for k, (prompt, seed, *_) in enumerate(result.request["items"]):
            kept = result.store.load_arrays(f"maps-{k:03d}") or {}
            arrays = dict(zip(map(str, kept["words"]), kept["maps"], strict=True))
            page = None if explorer is None else lambda k=k: explorer(k)
            found.append(PictureMaps(pictures[f"{k:03d}"], prompt, arrays, seed, self.about(result), page))
        return found

    def about(self, result: Result) -> str:
        """What was averaged over, in words."""
        request = result.request
        why = f" ({request['why']})" if request["why"] else ""
        layers = f"layer{'s' if len(request['layers']) > 1 else ''} {', '.join(map(str, request['layers']))}{why}"
        heads = "all heads" if len(request["heads"]) == result.data["model"]["heads"] else f"heads {request['heads']}"
        if self.image is not None:
            return f"{result.model_name}: {layers}, {heads}, sigma {self.sigma:g}"
        return f"{result.model_name}: {layers}, {heads}, {len(request['steps'])} of {self.num_steps} steps"

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.overlay import maps_sheet

        pictures = self.maps(result)
        return {"maps": maps_sheet(pictures, title=pictures[0].prompt if len(pictures) == 1 else "")}

    def files(self, result: Result, folder: Path) -> None:
        for k, maps in enumerate(self.maps(result)):
            for number, (word, one) in enumerate(maps.items()):
                letters = re.sub(r"\W+", "-", word).strip("-")
                name = f"{k:03d}-{number:02d}-{letters}.png"
                with atomic.replacing(folder / "overlays" / name) as temporary:
                    one.overlay().save(temporary, format="PNG")

    def tell(self, result: Result) -> list[Text]:
        several = len(result.request["items"]) > 1
        table = TextTable(
            [*(["picture"] if several else []), "word", "mass", "max", "peak (row, column)"], left=("word",)
        )
        for row in result.table.to_dict("records"):
            cells = [str(row["item"])] if several else []
            peak = f"{row['peak_row']}, {row['peak_column']}"
            table.add(*cells, row["word"], f"{row['mass']:.4f}", f"{row['max']:.4f}", peak)
        return [
            table,
            "mass: mean probability of the word as key of image queries; max: its largest, at the peak on the token"
            " grid.",
            f"{self.about(result)}.",
        ]

    def document(self, result: Result) -> dict[str, Any]:
        overlays = None if result.path is None else sorted((result.path / "overlays").glob("*.png"))
        return {"layers": result.request["layers"], "words": result.table, "overlays": overlays}


def word_maps(
    target: Any, prompt: str | Sequence[str] | None = None, *, progress: bool = False, **options: Any
) -> PictureMaps | list[PictureMaps]:
    """Heat maps of a prompt's words: the maps of one picture, or a list where several prompts or pictures are asked.

    Args:
        target: one's own stock pipeline, an `MMDiT`, or a name: an embedded model, a diffusers folder, a hub id.
        prompt: one or several; with `image` the photo's text.
        progress: whether to show it, on stderr.
        options: those of `WordMaps`: words, seed, image (a file, a PIL picture, an array), images_per_prompt, layers,
            heads, steps, stream, num_steps, guidance, height, width, sigma.

    Raises:
        UserError: a word that no prompt has, bad options, or no such model.
    """
    from mmdit_probe.experiments.explore import Explore
    from mmdit_probe.experiments.progress import Progress
    from mmdit_probe.experiments.target import as_model

    shown = Progress(quiet=not progress)
    model = as_model(target, shown)
    experiment = WordMaps(prompt=prompt, **options)
    result = experiment.run(model, progress=shown)
    items = result.request["items"]

    def explorer(number: int) -> Any:
        text, seed, words = items[number][:3]
        picture = None
        if experiment.image is not None:
            picture = experiment.gather(False)[1][number].open()
        shared = {
            name: getattr(experiment, name) for name in ("num_steps", "guidance", "height", "width", "stream", "sigma")
        }
        page = Explore(prompt=[text], words=words, image=picture, seed=seed, layers=experiment.layers, **shared)
        return page.pages(page.run(model, progress=shown))[0]

    found = experiment.maps(result, explorer)
    several = len(found) > 1 or isinstance(prompt, list | tuple)
    return found if several else found[0]


def words_of(table: TokenTable, asked: Sequence[str] | None, stream: str | None = None) -> tuple[str, ...]:
    """The words of a prompt that are asked for (None: all but signs, each once) and that an encoder reads."""
    found: dict[str, str] = {}
    for word in table.words if asked is None else asked:
        if any(map(str.isalnum, word)):
            found.setdefault(word.casefold(), word)
    spans = {word: table.word_spans(word, missing_ok=True) for word in found.values()}
    return tuple(word for word, of in spans.items() if (of if stream is None else stream in of))


def grounding(model: MMDiT) -> tuple[tuple[int, ...], str]:
    """The layers that ground words, best first, and who says so: known ones, else the middle third."""
    from mmdit_probe.segment.capture import middle_layers

    count = len(model.layers)
    names = (model.name, getattr(model.pipeline.config, "_name_or_path", None) or "")
    for part, layers, source in KNOWN_LAYERS:
        if any(part in Path(name).name.lower() for name in names) and max(layers) < count:
            return layers, source
    return middle_layers(count), "the middle third"
