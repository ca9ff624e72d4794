"""One labelled picture: the classes that are named (`Segment`), or what falls apart without names (`Discover`).

    result = Segment(image="cat.jpg", classes="cat, wet grass, sky").run("scenes-sd3")
    result.labels, result.table; result.figure(); result.save("runs/cat")

Section 3.4 and 3.5 of arXiv:2509.18096. One picture is done or not done: there is nothing to resume. Not here: the
methods (`segment`), data sets (`experiments.evaluate`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.data import Sample, parse_classes, single
from mmdit_probe.data.sources import SCENES
from mmdit_probe.errors import UserError
from mmdit_probe.experiments.experiment import described, plain, request_of
from mmdit_probe.experiments.options import Input, check_places, notes_on
from mmdit_probe.experiments.progress import Progress
from mmdit_probe.experiments.reading import RULE, Network, Read, Reads, check_streams_read, options_of
from mmdit_probe.experiments.result import Answer
from mmdit_probe.experiments.text import Text, TextTable
from mmdit_probe.options import Option, check
from mmdit_probe.results import RunFolder, atomic
from mmdit_probe.results.folder import AUTO, check_out
from mmdit_probe.segment.settings import BLIND, NAMED, STEPS, Background, check_method, parse_steps, split_option
from mmdit_probe.specs import parse_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.data.class_names import SegClass
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.segment.run import Segmentation

READ_REGIONS = ("corrclip", "regions", "vote")
"""Methods and steps that take another program's regions."""
REFINE = f"none, or steps joined by +: {', '.join(STEPS)}; affinity:3 for three rounds."


@dataclass(frozen=True, kw_only=True)
class _Checked:
    def __post_init__(self) -> None:
        check(self)
        check_places(self)


@dataclass(frozen=True, kw_only=True)
class OnePicture(Reads, _Checked):
    """What both have in common: a picture, a method and how its maps become labels."""

    name: ClassVar[str]
    without: ClassVar[tuple[str, ...]] = ("resume",)
    unsupervised: ClassVar[bool]

    image: Annotated[Any, Input("Picture file, or scenes:val:0.", argument=True, values=[f"{one}:0" for one in SCENES])]
    method: str
    options: Annotated[
        Sequence[str],
        Option("Option of the method: name=value; repeatable.", flag="--set",
               values=partial(options_of, (*NAMED, *BLIND))),
    ] = ()  # fmt: skip
    refine: Annotated[str, Option(REFINE, values=("none", *STEPS))] = "none"
    regions: Annotated[
        Path | None,
        Input("Label map of another program's regions (SAM, ...), 0 where there is none, for methods and steps that "
              "take regions.")
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self.method, self.unsupervised)
        steps = {name for name, _ in parse_steps(self.refine)}
        if self.regions is not None and not {self.method, *steps} & {*READ_REGIONS}:
            raise UserError(f"--regions are read by {', '.join(READ_REGIONS)} alone; name one as method or refinement")
        if "heads" in self.asked() and (self.heads is not None or self.selection is not None):
            raise UserError("--set heads and --heads or --selection both name heads; give one")

    def asked(self) -> dict[str, Any]:
        """The options of the method: texts, or values."""
        return dict(split_option(text) for text in self.options)

    @abstractmethod
    def names(self) -> list[SegClass]:
        """What is named to the model."""

    @abstractmethod
    def find(self, model: MMDiT, picture: Any, read: Read, values: dict[str, Any], regions: Any) -> Segmentation:
        """Label the picture."""

    def run(
        self, target: Any = "scenes-sd3", out: Path | str | None = None, resume: bool = False,
        progress: bool | Progress = True,
    ) -> PictureResult:  # fmt: skip
        """Label the picture.

        Args:
            target, progress: as in `Experiment.run`.
            out: run folder to write into; "auto" stands for `runs/<name>/<time>-<hash>`; None writes nothing.
            resume: leave a finished run of the same request in `out` as it is, and write one that was cut short.

        Raises:
            UserError: bad options, picture or model.
        """
        from mmdit_probe.data.labels import read_label_map, region_ids
        from mmdit_probe.experiments.target import Named, as_model, named

        shown = progress if isinstance(progress, Progress) else Progress(quiet=not progress)
        check_out(out, resume or None, self.name)
        target = named(target, self)
        sample, classes = self._sample(), self.names()
        self.read_selection()
        pixels = sample.image
        regions = None if self.regions is None else region_ids(read_label_map(self.regions), pixels.shape[:2])
        if isinstance(target, Named):
            check_streams_read(self.asked(), "no_t5" in target.text)
            target.check_size(parse_size(self.size))
        model = as_model(target, shown)
        from mmdit_probe.segment.methods import METHODS  # torch, only for a request that can be met

        read = self.reading(Network.of(model))
        method = METHODS[self.method]
        reads_heads = self.heads is not None or "heads" in method.defaults
        heads = {"heads": read.heads} if read.heads is not None and reads_heads else {}
        values = dict(method.configure(self.asked() | heads).options)
        notes = [f"{sample.name}: {note}" for note in sample.notes] + read.notes
        notes += model.notes_on_words([name for one in classes for name in one.synonyms])
        notes += notes_on(model, [sample])
        found = self.find(model, pixels, read, values, regions)
        notes += _overflow(found)
        for note in notes:
            shown.note(note)
        request = request_of(model, image=sample.name, content=sample.fingerprint(), **self._request(read, values))
        facts = described(model) | {
            "seed": self.seed,
            "remarks": notes,
            "options": plain(asdict(self) | {"image": sample.name}),
        }
        result = PictureResult(self, found, request, facts)
        if out is not None:
            result.save(None if out == AUTO else out, resume or None)
        return result

    def _sample(self) -> Sample:
        if isinstance(self.image, Sample):
            return self.image
        return single(str(self.image)) if isinstance(self.image, str | Path) else Sample("picture", self.image)

    def _request(self, read: Read, values: dict[str, Any]) -> dict[str, Any]:
        how = read.reading
        return {
            "method": self.method, "options": plain(values), "refine": self.refine, "layers": plain(how.layers),
            "weights": plain(how.weights), "sigmas": list(how.sigmas), "seeds": list(how.seeds), "fit": how.fit,
            "size": plain(how.size), "regions": plain(self.regions),
            **({"reference": how.reference} if how.reference != "none" else {}),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Segment(OnePicture):
    """Label every pixel of a picture with one of the classes you name.

    Writes labels.png (indexed, with a palette), overlay.png and the sheet of maps, probability maps as 8-bit PNG and as
    safetensors, segmentation.json with the area of each class, and run.json into a run folder.
    """

    name = "segment"
    unsupervised = False
    examples = (
        'scenes:val:3 --classes "tree, ring, grass, sky"',
        'cat.jpg --classes "cat; kitten, wet grass" --method iseg --refine affinity+pamr',
    )

    classes: Annotated[
        str | Path | Sequence[Any],
        Input("Names by comma, synonyms by semicolon: 'cat; kitten, wet grass'; or a .txt file, one per line."),
    ]
    method: Annotated[str, Option(f"{', '.join(NAMED)}.", values=NAMED)] = "seg4diff"
    background: Annotated[str, RULE] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        Background.parse(self.background)

    def names(self) -> list[SegClass]:
        return parse_classes(self.classes)

    def find(self, model: MMDiT, picture: Any, read: Read, values: dict[str, Any], regions: Any) -> Segmentation:
        from mmdit_probe.segment.run import segment

        return segment(
            model, picture, self.names(), read.reading, method=self.method, options=values, refine=self.refine,
            background=self.background, regions=regions,
        )  # fmt: skip

    def _request(self, read: Read, values: dict[str, Any]) -> dict[str, Any]:
        classes = [list(one.synonyms) for one in self.names()]
        return super()._request(read, values) | {"classes": classes, "background": self.background}


@dataclass(frozen=True, kw_only=True)
class Discover(OnePicture):
    """Split a picture into segments without any class names, from the empty prompt. Files as `segment` writes them."""

    name = "discover"
    unsupervised = True
    examples = ("scenes:val:3", 'cat.jpg --method diffcut --names "cat, sofa, wall" --refine pamr')

    method: Annotated[str, Option(f"{', '.join(BLIND)}.", values=BLIND)] = "seg4diff-unsup"
    tau: Annotated[float | None, Option("Merging threshold of the method; scan it per model.", min=0)] = None
    candidates: Annotated[
        str | Path | Sequence[Any] | None,
        Input("Candidate names by comma, or a .txt file: each segment takes the one that fits best.", flag="--names"),
    ] = None
    names_by: Annotated[
        str, Option("Method whose maps of the candidates decide: seg4diff (the I2T words), proxyclip (a CLIP), ...",
                    values=NAMED),
    ] = "seg4diff"  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.names_by in BLIND:
            raise UserError(f"--names-by {self.names_by!r} reads no names; take one of {', '.join(NAMED)}")
        check_method(self.names_by)
        if self.candidates is None and self.names_by != type(self).names_by:
            raise UserError("--names-by says how segments take one of the candidates; give them with --names")

    def asked(self) -> dict[str, Any]:
        return super().asked() | ({} if self.tau is None else {"tau": self.tau})

    def names(self) -> list[SegClass]:
        return [] if self.candidates is None else parse_classes(self.candidates)

    def find(self, model: MMDiT, picture: Any, read: Read, values: dict[str, Any], regions: Any) -> Segmentation:
        from mmdit_probe.segment.run import discover, name_segments

        found = discover(
            model, picture, read.reading, method=self.method, options=values, refine=self.refine, regions=regions
        )
        if self.candidates is None:
            return found
        return name_segments(
            model, found, self.names(), method=self.names_by, weights=read.reading.weights, reference=self.as_reference
        )

    def _request(self, read: Read, values: dict[str, Any]) -> dict[str, Any]:
        named = {"names": [list(one.synonyms) for one in self.names()], "names_by": self.names_by}
        return super()._request(read, values) | (named if self.candidates is not None else {})


class PictureResult(Answer):
    """A labelled picture.

    Attributes:
        found: labels, probabilities, names and the capture. request, data: as in `run.json`. path: the run folder.
    """

    def __init__(
        self, experiment: OnePicture, found: Segmentation, request: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        self.experiment, self.found, self.request, self.data = experiment, found, request, facts
        self.path: Path | None = None

    @property
    def labels(self) -> Any:
        """[height, width] index into `names`."""
        return self.found.labels

    @property
    def names(self) -> list[str]:
        return self.found.names

    @property
    def areas(self) -> dict[str, dict[str, Any]]:
        """Pixels and share of the picture per name."""
        return self.found.areas()

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per class or segment: index in `labels`, class, pixels, and their share of the picture."""
        return pd.DataFrame([{"index": k, "class": name, **area} for k, (name, area) in enumerate(self.areas.items())])

    @property
    def summary(self) -> pd.DataFrame:
        """The table: one picture is summed up by its areas."""
        return self.table

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Picture, labels and maps."""
        from mmdit_probe.plots.segmentation import overlay_sheet

        layers, sigmas = self.found.capture.layers, self.request["sigmas"]
        where = f"layers {','.join(map(str, layers))}, sigma {', '.join(f'{sigma:g}' for sigma in sigmas)}"
        title = f"{self.request['image']}: {self.request['method']}, {where}"
        shares = self.found.probabilities.numpy()
        return {"sheet": overlay_sheet(self.found.capture.image, self.labels, self.names, shares, title=title)}

    def texts(self) -> list[Text]:
        table = TextTable([*self.table], left=("class",))
        for index, name, pixels, share in self.table.itertuples(index=False):
            table.add(str(index), name, str(pixels), f"{share:.1%}")
        alone = not self.experiment.unsupervised and len(self.names) == 1
        return [table, "one class and no background rule: 100 % by definition"] if alone else [table]

    def document(self) -> dict[str, Any]:
        """What the command prints with `--json`, and segmentation.json holds."""
        files: dict[str, Any] = {}
        if (path := self.path) is not None:
            files = {"run": str(path), "labels": str(path / "labels.png"), "overlay": str(path / "overlay.png")}
            files |= {"figures": [str(path / f"sheet{suffix}") for suffix in (".png", ".pdf")]}
        capture = self.found.capture
        return files | {
            "names": self.names, "areas": self.areas, "request": self.request,
            "prompts": [one.prompt.text for one in capture.passes], "grid": list(capture.grid),
            "layers": list(capture.layers), "remarks": self.data["remarks"],
        }  # fmt: skip

    def save(self, folder: Path | str | None = None, resume: bool | None = None) -> Path:
        """Write what the command writes into a run folder: new or empty, `runs/<name>/...` if none is named.

        Args:
            resume: also into that of a run of the same request; a finished one is left as it is.
        """
        from mmdit_probe.plots import save

        with RunFolder.open(self.experiment.name, self.request, out=folder, resume=resume) as opened:
            self.path = opened.path
            if not opened.complete:
                opened.record(**self.data)
                self._write_pictures(opened.path)
                save(self.figure(), opened.path / "sheet")
                atomic.write_json(opened.path / "segmentation.json", self.document())
        return opened.path

    def _write_pictures(self, folder: Path) -> None:
        from PIL import Image
        from safetensors.numpy import save_file

        from mmdit_probe.plots.segmentation import blend, write_labels

        shares = self.found.probabilities.numpy()
        write_labels(self.labels, folder / "labels.png", self.names)
        pictures = {"overlay.png": blend(self.found.capture.image, self.labels, self.names)}
        for index, share in enumerate(shares):
            pictures[f"maps/{index:03d}-{atomic.letters(self.names[index])}.png"] = np.rint(255 * share).astype(
                np.uint8
            )
        for name, pixels in pictures.items():
            with atomic.replacing(folder / name) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
        with atomic.replacing(folder / "probabilities.safetensors") as temporary:
            save_file({"probabilities": np.ascontiguousarray(shares, np.float32)}, temporary)

    def __repr__(self) -> str:
        return f"{type(self.experiment).__name__} of {self.request['image']}: {', '.join(self.names)}"


def _overflow(found: Segmentation) -> Iterator[str]:
    """A remark where the names fill several prompts."""
    passes = found.capture.passes
    for extra in passes[1:2]:
        yield f"{len(passes)} prompts: the names overflow the text encoders ({extra.prompt.text!r}, ...)"
