"""Evaluate: segmentation methods compared on the same forwards of the same images, under a named protocol.

    result = Evaluate(dataset="scenes:val", method="seg4diff,iseg", limit=50).run("scenes-sd3")
    result.summary                     # the league table: mIoU under both averaging rules, accuracy, intervals
    Evaluate(preset="seg4diff", dataset="voc20:VOCdevkit").run("stabilityai/stable-diffusion-3-medium-diffusers")

Rows of different protocols must not be ranked against each other. Not here: which forwards and counts an image needs
(`evaluate.plan`), scores (`evaluate.league`), what papers did (`experiments.presets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mmdit_probe.data import Dataset, paper_table, read_json
from mmdit_probe.data.sources import NAMES
from mmdit_probe.errors import UserError, check_known, counted
from mmdit_probe.experiments.attention_budget import PAPER_MODEL
from mmdit_probe.experiments.experiment import Experiment, Study, plain, text_of
from mmdit_probe.experiments.options import Input, Output
from mmdit_probe.experiments.presets import AS_WORD, PAPER_LENGTH, PRESETS, Preset
from mmdit_probe.experiments.reading import FIT, RULE, SIGMA, Network, Reads, check_streams_read, options_of
from mmdit_probe.experiments.target import knows_scenes
from mmdit_probe.experiments.text import Text, TextTable, share, signed
from mmdit_probe.models.names import check_checkpoint, contents_of
from mmdit_probe.options import Option
from mmdit_probe.results.folder import check_folder
from mmdit_probe.results.statistics import A_VERDICT_TAKES, ABOVE, TOO_FEW
from mmdit_probe.segment.settings import (
    BLIND,
    NAMED,
    STEPS,
    Background,
    check_method,
    parse_batch,
    parse_steps,
    scoring_size,
    split_option,
)
from mmdit_probe.specs import listed, named_of, parse_size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mmdit_probe.evaluate.captures import Captures
    from mmdit_probe.evaluate.plan import Plan
    from mmdit_probe.experiments.progress import Progress
    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import Store, TaskRecord

TAGS = "tags"
PROTOCOLS = ("present", "predicted", "full")
PLAIN = Preset("", "seg4diff")
"""What is done where neither options nor a preset say otherwise."""
SHOWN = 60
"""Rows of the league table that the terminal shows."""
PLACES = ("protocol", "method", "refine", "layers", "heads", "sigma")
Words = str | Sequence[str]


@dataclass
class _State:
    """What `measure` needs: the plan, its captures, the tagger of the protocol "predicted", and the counts to come."""

    plan: Plan
    captures: Captures
    tagging: Any
    counts: Iterator[dict[str, Any]] = field(default_factory=lambda: iter(()))


@dataclass(frozen=True, kw_only=True)
class Evaluate(Reads, Experiment):
    """Score segmentation methods on a data set: mIoU under both averaging rules, accuracy, intervals over images.

    Writes counts.parquet (sparse confusion counts per image and configuration), league.csv, per_class.csv and the
    figure. Rows of different protocols must not be ranked against each other.
    """

    name = "evaluate"
    tables = ("counts", TAGS)
    examples = (
        "--method seg4diff,iseg,diffcut --refine none,affinity+pamr --limit 20",
        "--preset seg4diff --dataset voc20:VOCdevkit --model MODEL --device cuda",
        "--sweep layer --layers all --limit 20",
    )

    dataset: Annotated[
        str, Input("scenes:val, or NAME:ROOT; `mmdit-probe datasets list` names them.", values=NAMES)
    ] = "scenes:val"
    limit: Annotated[int | None, Input("Use the first LIMIT images.", min=1, shown_default="200 scenes, or all")] = None
    preset: Annotated[
        Literal[
            "seg4diff", "seg4diff-unsup", "diffseg", "diffcut", "diffsegmenter", "iseg", "proxyclip", "corrclip"
        ] | None,
        Option("What the paper of this method did: text, noise level, background, resizing, matching. Options that are"
               " given win."),
    ] = None  # fmt: skip
    method: Annotated[
        Words | None,
        Option(f"Methods by comma: {', '.join((*NAMED, *BLIND))}.", values=(*NAMED, *BLIND),
               shown_default=PLAIN.methods),
    ] = None  # fmt: skip
    protocol: Annotated[
        Words | None,
        Option("Who says which classes there are: present, predicted, full; several by comma.",
               values=PROTOCOLS, shown_default=PLAIN.protocol),
    ] = None  # fmt: skip
    refine: Annotated[
        Words | None,
        Option(f"Refinements by comma, each measured: none,pamr,affinity+pamr. Steps: {', '.join(STEPS)}.",
               values=("none", *STEPS), shown_default=PLAIN.refine),
    ] = None  # fmt: skip
    options: Annotated[
        Sequence[str],
        Option("Option of a method: iseg.ent=0.02; repeatable.", flag="--set",
               values=partial(options_of, (*NAMED, *BLIND), "{method}.")),
    ] = ()  # fmt: skip
    background: Annotated[str | None, replace(RULE, shown_default=PLAIN.background)] = None
    sweep: Annotated[Literal["none", "layer", "head", "sigma"], Option("Each layer, head or sigma alone.")] = "none"
    match: Annotated[
        Literal["image", "upstream", "majority", "dataset", "row"] | None,
        Option("Matching of segments to classes.", shown_default=PLAIN.match),
    ] = None
    score_size: Annotated[
        str | None,
        Option("Compare labels at HxW, or short:SIDE, of what the network is shown.", shown_default="the label's own"),
    ] = None
    many_to_one: Annotated[bool, Option("Segments left over join the background class (DiffCut).")] = False
    tags: Annotated[Path | None, Input("JSON for the protocol 'predicted': image name -> class names.")] = None
    tagger: Annotated[
        str | None,
        Option("Tagger for the protocol 'predicted': a CLIP (embedded name, folder or hub id), or scenes-parser."),
    ] = None
    tag_dataset: Annotated[
        str | None,
        Option(
            "Labelled images that the tagger's threshold is chosen on.",
            shown_default="scenes:train for scenes",
            values=NAMES,
        ),
    ] = None
    tag_threshold: Annotated[
        float | None, Option("Threshold of the tagger, 0 or less, in place of one chosen on --tag-dataset.", max=0)
    ] = None
    batch: Annotated[
        str | int,
        Option("Rows of a forward, of several images and prompts: auto (what a GPU's memory holds, what is fastest on a"
               " CPU) or a number. Scores do not depend on it.", values=("auto",)),
    ] = "auto"  # fmt: skip
    cache: Annotated[
        Path | None,
        Output("Keep captured forwards here, so that methods re-run without the model; in float16, which moves scores"
               " a little (maps are kept to 0.05 %).")
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, names in (("method", self.methods), ("protocol", self.protocols), ("refine", self.refinements)):
            if not names:
                raise UserError(f"--{flag} names nothing; expected one or several by comma")
        for name in self.methods:
            check_method(name)
        named_of("protocol", self.protocols, PROTOCOLS)
        for steps in self.refinements:
            parse_steps(steps)
        Background.parse("none" if self.background is None else self.background)
        if self.scored_at is not None:
            scoring_size(self.scored_at, (1, 1))
            if (self.fit or self.how.fit) == "letterbox":
                raise UserError("--fit letterbox leaves bars around the picture; with --score-size take another fit")
        if self.many_to_one and self.matching in ("majority", "row"):
            raise UserError(f"--many-to-one joins segments that are left over, and --match {self.matching} leaves none")
        parse_batch(self.batch)
        for name, options in self.asked().items():
            check_known("method with options", name, self.methods)
            if "heads" in options and (self.sweep == "head" or self.heads is not None or self.selection is not None):
                raise UserError(f"--set {name}.heads and --heads, --selection or --sweep head all name heads; give one")
        check_checkpoint("--tagger", self.tagger, "scenes-clip", "scenes-parser")
        tagged = self.tagger_request() is not None or self.tags is not None
        if tagged != ("predicted" in self.protocols):
            raise UserError(
                "--tagger and --tags say which classes there are for --protocol predicted alone; name it too"
                if tagged else "protocol 'predicted' needs --tagger CLIP, or --tags FILE of another program's tags"
            )  # fmt: skip

    @property
    def how(self) -> Preset:
        """The preset, as it is on this data set, or the plain defaults."""
        return PLAIN if self.preset is None else PRESETS[self.preset].on(self.dataset.partition(":")[0])

    @property
    def methods(self) -> list[str]:
        return _split(self.how.methods if self.method is None else self.method)

    @property
    def protocols(self) -> list[str]:
        return _split(self.how.protocol if self.protocol is None else self.protocol)

    @property
    def refinements(self) -> list[str]:
        return _split(self.how.refine if self.refine is None else self.refine)

    @property
    def matching(self) -> str:
        return self.match or self.how.match

    @property
    def scored_at(self) -> str | None:
        return self.how.score_size if self.score_size is None else self.score_size

    @property
    def source(self) -> str:
        """The data set, with COCO-Object's background as a word where the preset has it so."""
        name, colon, root = self.dataset.partition(":")
        return f"{AS_WORD.get(name, name) if self.how.as_word else name}{colon}{root}"

    def values(self) -> dict[str, dict[str, Any]]:
        """Method -> its options."""
        from mmdit_probe.segment.methods import METHODS

        return {name: dict(METHODS[name].configure(asked).options) for name, asked in self.asked().items()}

    def asked(self) -> dict[str, dict[str, str]]:
        """Method -> the texts of its options.

        Raises:
            UserError: not METHOD.OPTION=VALUE.
        """
        of_preset = [text for text in self.how.options if text.partition(".")[0] in self.methods]
        found: dict[str, dict[str, str]] = {}
        for text in (*of_preset, *self.options):
            name, value = split_option(text)
            method, dot, option = name.partition(".")
            if not dot:
                raise UserError(f"--set {text!r}: expected METHOD.OPTION=VALUE, e.g. iseg.ent=0.02")
            found.setdefault(method, {})[option] = value
        return found

    def tagger_request(self) -> dict[str, Any] | None:
        """The tagger: its name, and a threshold or the images it is chosen on.

        Raises:
            UserError: options that belong to a tagger without one, two sources of tags, or no threshold.
        """
        split = self.tag_dataset
        if self.tagger is None:
            if split is not None or self.tag_threshold is not None:
                raise UserError("--tag-dataset and --tag-threshold are of a tagger; name it with --tagger")
            return None
        if self.tags is not None:
            raise UserError("--tags and --tagger both say which classes there are; give one of them")
        if split is not None and self.tag_threshold is not None:
            raise UserError("--tag-threshold stands in place of one chosen on --tag-dataset; give one of them")
        if self.tag_threshold is None and split is None:
            if not self.dataset.startswith("scenes"):
                raise UserError(
                    "a tagger needs a threshold: --tag-threshold, or --tag-dataset NAME:ROOT, other images to choose it"
                    " on"
                )
            split = "scenes:train"
        if split == self.dataset:
            raise UserError(
                f"--tag-dataset {split!r} are the images that are evaluated; choose the threshold on others"
            )
        chosen = self.tag_threshold is None
        return {"name": self.tagger, "split": split if chosen else None, "threshold": self.tag_threshold}

    def gather(self, scenes: bool) -> tuple[Dataset, Mapping[str, Sequence[str]] | None]:
        """The data set, and the tags of another program."""
        from mmdit_probe.data.sources import dataset

        if self.cache is not None:
            check_folder(self.cache, "--cache")
        self.read_selection()
        data = dataset(self.source, self.limit)
        if self.many_to_one and data.background is None:
            raise UserError(f"{data.name} has no background class, so --many-to-one has nothing to join segments to")
        return data, None if self.tags is None else _read_tags(self.tags)

    def load(self, target: Any, shown: Progress) -> Captures:
        """Captures of the model, which is loaded when one is missing."""
        from mmdit_probe.experiments.target import Named, as_model, named

        target, rows = named(target), parse_batch(self.batch)
        if isinstance(target, Named):
            target.check_size(parse_size(self.size or self.how.size))
        from mmdit_probe.evaluate.captures import Captures  # torch, only for a request that can be met

        if isinstance(target, Named):
            target = self._with_text(target)
            text = target.text
            memory = {name: target.options.get(name) for name in ("offload", "quantize")}
            dtype = str(target.options.get("dtype", "auto")).removeprefix("torch.")
            captures = Captures(
                lambda: as_model(target, shown), target.full_name, self.cache, text, rows, memory, dtype
            )
            if target.options.get("lora") or str(memory["quantize"]).startswith("gguf:"):
                _ = captures.model  # its files may hold other weights than when the cache was made: compare now
        else:
            model = as_model(target, shown)
            text = text_of(model)
            if self.how.paper_text and hasattr(model.pipeline, "text_encoder_3") and not text.get("no_t5"):
                raise UserError(f"--preset {self.preset} reads text without T5: load the model with t5=False")
            captures = Captures(lambda: model, model.name, self.cache, text, rows, model.memory)
            _ = captures.model  # at hand already, and its name says little: compare now
        for options in self.asked().values():
            check_streams_read(options, "no_t5" in text)
        return captures

    def _with_text(self, target: Any) -> Any:
        """The target with the text of the preset: T5 left out where there is one, its slots as many as CLIP's."""
        from mmdit_probe.models.load import can_leave_out_t5

        if not self.how.paper_text or not can_leave_out_t5(target.name):
            return target
        # The embedded model's own length is its CLIP's already.
        length = target.max_sequence_length or (None if knows_scenes(target) else PAPER_LENGTH)
        return replace(target, options={**target.options, "t5": False}, max_sequence_length=length)

    def describe(self, model: Captures) -> dict[str, Any]:
        return {"model": model.facts | model.memory}

    def prepare(self, model: Captures, inputs: tuple[Dataset, Mapping[str, Sequence[str]] | None]) -> Study:
        from mmdit_probe.evaluate.plan import Plan, Scoring
        from mmdit_probe.evaluate.tagger import Tagging

        (data, tags), facts, how = inputs, model.facts, self.how
        network = Network(facts["id"], facts["weight_hash"], range(facts["layers"]), facts["heads"])
        reading, heads, notes = self.reading(network, how.sigma or SIGMA, how.fit or FIT, how.size)
        rule = self.background or (how.background if data.background is not None else "none")
        tagger = self.tagger_request()
        tagging = None if tagger is None else Tagging.of(data, **tagger)
        said_tags = tags if tagging is None else tagging
        scoring = Scoring(tuple(self.protocols), said_tags, rule, self.matching == "row", self.scored_at)
        request: dict[str, Any] = {
            "model": facts["id"], "weight_hash": facts["weight_hash"], "dtype": facts["dtype"], **model.text,
            "dataset": self.source, "images": len(data.samples), "content": data.fingerprint(),
            "methods": self.methods, "protocols": self.protocols, "refine": self.refinements,
            "options": self.values(), "background": rule, "sweep": self.sweep, "layers": plain(reading.layers),
            "heads": plain(heads), "weights": plain(reading.weights), "sigmas": list(reading.sigmas),
            "seeds": list(reading.seeds), "fit": reading.fit, "size": plain(reading.size), "tags": tags,
            "tagger": tagger, "by_rows": scoring.by_rows, "score_size": scoring.size,
            **({"reference": reading.reference} if reading.reference != "none" else {}),
        }  # fmt: skip
        plan = Plan.of(
            data, self.methods, (facts["layers"], facts["heads"]), reading=reading, scoring=scoring,
            refine=self.refinements, options=self.values(), heads=heads, sweep=self.sweep,
        )  # fmt: skip
        notes += [data.note] if data.note else []
        if data.background is not None and rule == "none" and not set(self.methods) <= set(BLIND):
            notes.append("the background counts as a class of the mIoU, which --background none does not predict")
        notes += [f"preset {self.preset} ({how.source}): {how.differs}"] if how.differs else []
        if tagging is not None and tagging.split is not None:
            count = counted(len(tagging.split), "image")
            notes.append(f"the tagger's threshold is chosen on {count} of {tagger['split']}")  # type: ignore[index]
        named = [value for options in self.values().values() for value in options.values()]
        checkpoints = [self.tagger, *(value for value in named if isinstance(value, str))]
        said = {
            "classes": [list(one.synonyms) for one in data.classes], "agnostic": data.agnostic,
            "images": [sample.name for sample in data.samples], "background": data.background, "remarks": notes,
            "preset": self.preset, "dataset": data.facts, "contents": contents_of(*checkpoints),
        }  # fmt: skip
        tasks = range(len(data.samples))
        return Study(model, request, tasks, facts=said, unit="images", notes=notes, state=_State(plan, model, tagging))

    def said(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        from mmdit_probe.segment.methods import METHODS

        known = {name: METHODS[name] for name in request["methods"] if name in METHODS}
        of = {name: method.said(request["options"].get(name, {})) for name, method in known.items()}
        return {**request, "options": {**request["options"], **plain(of)}}

    def begin(self, study: Study, tasks: Sequence[int]) -> None:
        study.state.counts = study.state.plan.rows(study.state.captures, tasks)

    def measure(self, study: Study, task: int, record: TaskRecord) -> None:
        state: _State = study.state
        counts = next(state.counts)
        if state.tagging is not None:
            record.write(TAGS, {"tag": state.tagging[state.plan.dataset.samples[task].name]}, image=task)
        record.write("counts", counts)

    def finish(self, study: Study, store: Store) -> None:
        if study.state.tagging is not None:
            store.record(tagger=study.state.tagging.about)

    def summarise(self, result: Result) -> pd.DataFrame:
        from mmdit_probe.evaluate.league import league

        facts = result.data
        table = league(
            result.table, len(facts["classes"]), match=self.matching, background=self._joined(result),
            agnostic=facts["agnostic"],
        )  # fmt: skip
        if self.preset is not None:
            table.insert(0, "preset", self.preset)
        if self.scored_at is not None:
            table.insert(0, "score_size", self.scored_at)
        return table

    def _joined(self, result: Result) -> int | None:
        """The class that segments left over join."""
        known: int | None = result.data["background"]
        return known if self.many_to_one or self.how.many_to_one else None

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        from mmdit_probe.evaluate.league import per_class

        if result.data["agnostic"]:
            return {"league": result.summary}
        names = [synonyms[0] for synonyms in result.data["classes"]]
        by_class = per_class(result.table, names, match=self.matching, background=self._joined(result))
        return {"league": result.summary, "per_class": by_class}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.league import head_figure, layer_figure, league_figure, sigma_figure

        title = f"{result.model_name} on {result.request['dataset']}"
        if self.sweep == "layer":
            paper = paper_table("miou_by_layer") if PAPER_MODEL in result.data["model"]["id"] else None
            return {"by_layer": layer_figure(result.summary, title, paper)}
        drawn = {"none": league_figure, "head": head_figure, "sigma": sigma_figure}[self.sweep]
        return {"league" if self.sweep == "none" else f"by_{self.sweep}": drawn(result.summary, title)}

    def tell(self, result: Result) -> list[Text]:
        rule = (
            "mIoU: mean over the masks of all images, its 95 % interval over images."
            if result.data["agnostic"]
            else "mIoU: union rule, its 95 % interval over images; mIoU gt: classes of the truth only (Seg4Diff's"
            " rule)."
        )
        said = self._tagger(result)
        matched = f"Protocols are not comparable with each other. Segments matched: {self.matching}."
        told = [] if said is None else [_told(said)]
        done = result.table["image"].nunique()
        if unscored := done - int(result.summary["n"].max()):
            told.append(f"Left out: {unscored} of {counted(done, 'image')}, without a pixel that is scored.")
        return [league_table(result.summary), rule, beside_controls(result.summary), *told, matched]

    def document(self, result: Result) -> dict[str, Any]:
        tagger = self._tagger(result)
        return {"league": result.summary, "match": self.matching, "request": result.request, "tagger": tagger}

    def _tagger(self, result: Result) -> dict[str, Any] | None:
        """How right the tags of the protocol "predicted" were."""
        from mmdit_probe.evaluate.tagger import quality

        if "predicted" not in self.protocols:
            return None
        images, names = result.data["images"], [synonyms[0] for synonyms in result.data["classes"]]
        about: dict[str, Any] = {"name": "tags of a file"}
        said = result.request["tags"]
        if self.tagger is not None:
            about = {"name": self.tagger, **result.data["tagger"]}
            said = {image: [] for image in images}
            if result.store.has(TAGS):
                for row in result.store.table(TAGS).itertuples():
                    said[images[row.image]].append(str(row.tag))
        found = quality(said, result.table, images, names, result.data["background"])
        shown = {"precision": found.precision, "recall": found.recall, "f1": found.f1, "per_image": found.per_image}
        return about | shown


def league_table(table: pd.DataFrame) -> TextTable:
    """The league table in text, without the rows of shifted words: one for each method, they stand in league.csv."""
    from mmdit_probe.evaluate.plan import SHIFTED

    table = table[~table["method"].str.endswith(SHIFTED)]
    columns = [*PLACES, "n", "mIoU", "95 %", "over control", "mIoU gt", "pixel acc", "mean acc", "gain", "segments"]
    read = table[table["control"] != ""]
    same = [name for name in PLACES[2:] if read[name].nunique() < 2]  # what is compared stays
    spare = [*same, "mean acc", "pixel acc", "segments", "mIoU gt", "gain", "over control"]
    out = TextTable(columns, left=PLACES, spare=spare)
    for row in table.head(SHOWN).to_dict("records"):
        bounds = "" if row["miou_low"] != row["miou_low"] else f"{share(row['miou_low'])}-{share(row['miou_high'])}"
        segments = "" if row["segments"] != row["segments"] else f"{row['segments']:.1f}"
        scores = [share(row[name]) for name in ("miou_gt", "accuracy", "macc")]
        gain = signed(row["gain"], row["gain_low"], row["gain_high"])
        over = signed(row["over"], row["over_low"], row["over_high"])
        places = [str(row[name]) for name in PLACES]
        out.add(*places, str(row["n"]), share(row["miou"]), bounds, over, *scores, gain, segments)
    if len(table) > SHOWN:
        out.add("...", f"{counted(len(table) - SHOWN, 'more row')} in league.csv", *[""] * (len(columns) - 2))
    return out


def beside_controls(table: pd.DataFrame) -> str:
    """How many methods are above their strongest control, and which those are."""
    from mmdit_probe.evaluate.plan import SHIFTED

    methods = table[table["control"] != ""]
    if methods.empty:
        return "No control was counted."
    met = methods["control"].where(~methods["control"].str.endswith(SHIFTED), SHIFTED.removeprefix(", "))
    names = ", ".join(f"{name} {count}" for name, count in met.value_counts().items())
    few = f"; {TOO_FEW}: {A_VERDICT_TAKES}" if (methods["verdict"] == TOO_FEW).any() else ""
    above = f"{int((methods['verdict'] == ABOVE).sum())} of {counted(len(methods), 'row')}"
    return (
        f"over control: mIoU over the strongest control with the same refinement ({names}), images paired; above it"
        f" with p <= .05 by Holm's correction: {above}{few}."
    )


def _told(tagger: Mapping[str, Any]) -> str:
    how = f", threshold {tagger['threshold']:.3g}" if "threshold" in tagger else ""
    how += f" chosen on {tagger['chosen_on']}" if "chosen_on" in tagger else ""
    return (
        f"predicted: {tagger['name']}{how}; precision {tagger['precision']:.2f}, recall {tagger['recall']:.2f}, "
        f"{tagger['per_image']:.1f} classes per image."
    )


def _split(text: Words) -> list[str]:
    return [part for part in listed(text) if part]


def _read_tags(path: Path) -> dict[str, list[str]]:
    data = read_json(path, "tags, image name -> list of class names")
    if not isinstance(data, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in data.values()
    ):
        raise UserError(f"--tags {str(path)!r}: expected an object, image name -> list of class names")
    return data
