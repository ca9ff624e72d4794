"""Score: what generated pictures show, per category, with and without adapters on the same seeds; Tables 3 and 4 of
arXiv:2509.18096.

    result = Score(limit=20, lora=["class=runs/class/lora"]).run("scenes-sd3")
    result.summary                     # per variant, category and metric: mean, paired difference, intervals, n

Differences between variants are small beside those between pictures, so that they are taken per (prompt, seed) and
averaged per prompt; intervals are over prompts, which are what a benchmark samples. On a model of the scenes world the
parser reads the pictures back, its own limit stands beside ("real"), and `map_sigma` adds where the words look.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.data import prompts
from mmdit_probe.data.prompt_sets import SETS
from mmdit_probe.errors import UserError, check_known, counted
from mmdit_probe.experiments.experiment import Experiment, Study, read_of_videos, request_of, scheduled
from mmdit_probe.experiments.options import Input, Output, Referring, Sampling
from mmdit_probe.experiments.target import knows_scenes
from mmdit_probe.experiments.text import Text, TextTable, bounded, signed
from mmdit_probe.experiments.token_rows import cut_off
from mmdit_probe.models.names import check_checkpoint, contents_of
from mmdit_probe.options import Option
from mmdit_probe.results import atomic
from mmdit_probe.results.clip import stills
from mmdit_probe.results.folder import check_folder
from mmdit_probe.results.statistics import NONE, Kind, corrected, defined, interval, judged, kind_of, no_worse
from mmdit_probe.scenes import CATEGORIES, captions, describe, scene, split_of_world
from mmdit_probe.scenes.captions import CONTRASTS, is_caption
from mmdit_probe.specs import listed, named_of, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import Store, TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

BASE, REAL, EVERY = "base", "real", "all"
KEYS = ["category", "index", "prompt", "seed"]
STREAMS = ("all", "clip", "t5")
"""Whose tokens make a word's map: both streams of the joint text, or one of them."""
_SHOWN = ("facts", "all_right", "things_right", "grounds_right")
_ADAPTER = "scored"
LONGEST = 255 - len("_000000.png")
"""Bytes of a prompt that a file system takes in the name of an exported picture."""


@dataclass(frozen=True)
class Job:
    """A task: pictures of a variant by number ("pictures"), or scenes as they are with their maps ("real")."""

    kind: str
    variant: str = BASE
    numbers: Sequence[int] = ()


@dataclass
class Scorers:
    """What looks at the pictures, and which adapter is loaded."""

    parser: Any = None
    clip: Any = None
    asker: Any = None
    loaded: str = BASE
    variants: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score(Sampling, Referring, Experiment):
    """Text-image alignment per category, CLIPScore and BLIP answers, paired over prompts and seeds between variants.

    Writes scores.parquet (one row per picture), comparison.csv (means, paired differences, 95 % intervals over prompts,
    n) and run.json.
    """

    name = "score"
    examples = (
        "--limit 5 --lora class=runs/magnet/lora",
        "--prompts T2I-CompBench/prompts --clip openai/clip-vit-base-patch16 --model MODEL",
    )
    tables = ("scores", "maps")
    columns: ClassVar[Mapping[str, Sequence[str]]] = {"maps": ("low", "high")}

    lora: Annotated[Sequence[str], Input("Adapter to compare with the base model: [NAME=]PATH; repeatable.")] = ()
    baseline: Annotated[str, Option("Variant that differences are taken to.")] = BASE
    categories: Annotated[str, Input("all, none, or categories of scenes: colour,numeracy,...")] = "all"
    limit: Annotated[int, Input("Prompts per category.", min=1)] = 20
    split: Annotated[Literal["train", "val", "test"], Input("Split of the scenes captions.")] = "val"
    prompts: Annotated[
        str | None,
        Input(
            "Score these prompts instead of scenes categories: a file, a text, a set, or a folder with one text file"
            " per category (T2I-CompBench: colour_val.txt, ...).",
            values=SETS,
        ),
    ] = None
    images_per_prompt: Annotated[int, Input("Pictures per prompt.", min=1)] = 1
    map_sigma: Annotated[
        str, Option("Noise levels at which the word maps of LIMIT scenes are scored per layer, by comma; or none.")
    ] = "none"
    clip: Annotated[
        str, Option("CLIP model of CLIPScore and CLIP similarity: scenes-clip, a folder, a hub id, or none.")
    ] = "scenes-clip"
    vqa: Annotated[
        str | None, Option("BLIP question-answering model (folder or hub id): P(yes) of each noun phrase.")
    ] = None
    export: Annotated[Path | None, Output("Also write the pictures in T2I-CompBench's folder layout.")] = None
    batch: Annotated[int, Output("Pictures sampled at once.", min=1)] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("variant", self.baseline, self.variants())
        self.sigmas()
        check_checkpoint("--clip", self.clip, "scenes-clip", "none")
        check_checkpoint("--vqa", self.vqa)
        unread = self.prompts is not None and self.clip == "none"
        if unread and self.vqa is None and self.export is None:
            raise UserError("nothing to score with: give a CLIP or BLIP model, or a folder to export to")
        if self.prompts is None and self.categories == self.map_sigma == "none":
            raise UserError(
                "--categories none without --map-sigma leaves nothing to score; name categories or noise levels"
            )

    def variants(self) -> dict[str, str | None]:
        """Name -> adapter; the base model first.

        Raises:
            UserError: two are called the same, or one is neither a path nor a hub id.
        """
        found: dict[str, str | None] = {BASE: None}
        for text in self.lora:
            name, named, path = text.partition("=")
            if not named or Path(text).exists():  # the sign may be the path's own
                name, path = "", text
            name = name or (Path(path).parent.name if Path(path).name == "lora" else Path(path).name)
            if name in found:
                raise UserError(f"two variants are called {name!r}; name them: --lora NAME=PATH")
            if not Path(path).exists() and path.count("/") != 1:
                raise UserError(f"no LoRA {path!r}: expected a folder as train-magnet writes it, or a hub id")
            found[name] = path
        return found

    def sigmas(self) -> list[float]:
        """Noise levels of the maps.

        Raises:
            UserError: they are none in 0..1.
        """
        if self.map_sigma == "none":
            return []
        refusal = f"--map-sigma {self.map_sigma!r}: expected noise levels in 0..1, e.g. 0.5 or 0.3,0.5, or none"
        return numbers(self.map_sigma, 0, 1, refusal)

    def gather(self, scenes: bool) -> list[tuple[str, str]]:
        if self.sigmas() and not scenes:
            raise UserError("--map-sigma scores word maps on scenes, which this model does not know; use evaluate")
        if self.export is not None:
            check_folder(self.export, "--export")
        if self.prompts is not None:
            found = prompts_by_category(self.prompts, self.limit)
            for _, text in found if self.export is not None else ():
                check_exportable(text)
            return found
        if self.categories == "none":
            return []
        chosen = () if self.categories == "all" else listed(self.categories)
        return scene_prompts(self.limit, chosen, self.split)

    def prepare(self, model: MMDiT, inputs: list[tuple[str, str]]) -> Study:
        from mmdit_probe.evaluate.blip import BlipAsker
        from mmdit_probe.evaluate.clipscore import ClipScorer
        from mmdit_probe.models.layout import unwrap
        from mmdit_probe.scenes import load_parser

        if self.lora and getattr(unwrap(model.transformer), "peft_config", None):
            raise UserError(
                "the model has an adapter, which would be taken off with those that are compared; make it part of the"
                " weights first (mmdit_probe.models.adapters.merge), or take it off"
            )
        scenes = self.prompts is None or (knows_scenes(model) and any(is_caption(text) for _, text in inputs))
        scorers = Scorers(
            load_parser() if scenes else None,
            None if self.clip == "none" else ClipScorer.load(self.clip),
            None if self.vqa is None else BlipAsker.load(self.vqa),
            variants=self.variants(),
        )
        each = self.images_per_prompt
        jobs = [(category, index, text) for index, (category, text) in enumerate(inputs) for _ in range(each)]
        tasks = [
            Job("pictures", variant, range(start, min(start + self.batch, len(jobs))))
            for variant in scorers.variants
            for start in range(0, len(jobs), self.batch)
        ]
        if self.sigmas() or (self.prompts is None and inputs):
            tasks.append(Job(REAL))
        request = request_of(
            model, variants=scorers.variants, prompts=inputs, images_per_prompt=each, num_steps=self.num_steps,
            guidance=self.guidance, seed=self.seed, clip=self.clip, vqa=self.vqa, maps=self.sigmas(), n=self.limit,
            split=split_of_world(self.split), export=None if self.export is None else str(self.export),
            batch=self.batch,
        )  # fmt: skip
        notes = read_of_videos(model) + strangers(scorers, self.clip, knows_scenes(model))
        notes += cut_off(model, [text for _, text in inputs])
        contents = contents_of(*scorers.variants.values(), self.clip, self.vqa)
        facts = scheduled(model, self.num_steps) | {"remarks": notes, "contents": contents}
        return Study(model, request, tasks, "batches", facts=facts, notes=notes, state=(jobs, scorers))

    def measure(self, study: Study, task: Job, record: TaskRecord) -> None:
        jobs, scorers = study.state
        try:
            adapt(study.model, scorers, task.variant)
            self._measure(study.model, task, record, jobs, scorers)
        except BaseException:  # Ctrl-C too: the model at hand is left as it was
            adapt(study.model, scorers, BASE)
            raise

    def _measure(
        self, model: MMDiT, task: Job, record: TaskRecord, jobs: Sequence[tuple[str, int, str]], scorers: Scorers
    ) -> None:
        if task.kind == REAL:
            for sigma in self.sigmas():
                record.write("maps", self._maps(model, sigma))
            record.write("scores", real_scenes(self.limit, self.split, scorers))
        else:
            record.write("scores", self._pictures(model, task, jobs, scorers))

    def finish(self, study: Study, store: Store) -> None:
        adapt(study.model, study.state[1], BASE)

    def _maps(self, model: MMDiT, sigma: float) -> pd.DataFrame:
        from mmdit_probe.experiments.scenes_quality import grid_ceiling, held_out, word_map_scores

        items = held_out(self.limit, self.split)
        table = word_map_scores(model, items, sigma=sigma, seed=self.seed, streams=STREAMS)
        return table.assign(ceiling=grid_ceiling(items, model.default_size[0] // model.size_multiple))

    def _pictures(
        self, model: MMDiT, task: Job, jobs: Sequence[tuple[str, int, str]], scorers: Scorers
    ) -> pd.DataFrame:
        """Rows of some pictures: picture j of prompt k is drawn from seed + images k + j whatever the variant."""
        chosen = [jobs[number] for number in task.numbers]
        seeds = [self.seed + number for number in task.numbers]
        texts = [text for _, _, text in chosen]
        pictures = stills(model.generate(texts, steps=self.num_steps, guidance=self.guidance, seed=seeds))
        frame = pd.DataFrame(
            {"variant": task.variant, "category": category, "prompt": text, "index": index, "seed": seed}
            for (category, index, text), seed in zip(chosen, seeds, strict=True)
        )
        if self.export is not None:
            for (category, _, text), number, picture in zip(chosen, task.numbers, pictures, strict=True):
                export(picture, self.export / task.variant / category / "samples", text, number)
        return scored(frame, pictures, scorers)

    def summarise(self, result: Result) -> pd.DataFrame:
        table = result.table
        drawn = table[table["category"] != REAL]  # none with --categories none: the parser's limit is what there is
        return compare_variants(drawn if len(drawn) else table, self.baseline)

    def scores(self, result: Result) -> pd.DataFrame:
        """Of every prompt, in whatever categories, the mean over its pictures."""
        drawn = result.table[result.table["category"] != REAL]
        metrics = [name for name in drawn.columns if name not in ("variant", *KEYS)]
        prompts = drawn.astype(dict.fromkeys(metrics, float)).groupby(["variant", "prompt"], observed=True)[metrics]
        table = prompts.mean().reset_index().rename(columns={"prompt": "item"}).assign(control=NONE)
        return table.melt(["item", "control", "variant"], metrics, "outcome")

    def sign(self, outcome: str) -> float:
        return sign_of(outcome)

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        return {"comparison": result.summary}

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.magnet import differences, scores

        title, main = f"{result.model_name}: {self._how(result)}", result.summary["metric"].iloc[0]
        figures = {"scores": scores(result.summary, main, title=title)}
        if result.summary["variant"].nunique() > 1:
            figures["differences"] = differences(result.summary, main, self.baseline, title=title)
        return figures

    def _how(self, result: Result) -> str:
        count = result.summary["prompts"].max()
        return f"n = {counted(count, 'prompt')}, {counted(self.num_steps, 'step')}, guidance {self.guidance:g}"

    def tell(self, result: Result) -> list[Text]:
        from mmdit_probe.scenes.parser import SCORES

        shown = [
            metric
            for metric in dict.fromkeys(result.summary.metric)
            if metric in _SHOWN or metric.startswith(("clipscore", "blip_yes"))
        ]
        texts: list[Text] = [variant_table(result.summary, metric, self.baseline) for metric in shown]
        texts += [line for metric in shown for line in verdict_lines(result.summary, metric, self.baseline)]
        real = result.table[result.table["category"] == REAL]
        if "facts" in real:
            stated = opposite_table(result.summary)
            texts += [stated] if stated.rows else []
            means = real[list(SCORES)].astype(float).mean().dropna()  # what no caption states has no score
            limits = ", ".join(f"{str(name).replace('_', ' ')} {mean:.3f}" for name, mean in means.items())
            texts.append(f"the parser on {len(real)} real scenes, its own limit: {limits}.")
        if result.store.has("maps"):
            texts.append(map_table(result.store.table("maps")))
        return texts

    def document(self, result: Result) -> dict[str, Any]:
        maps = {"maps": result.store.table("maps")} if result.store.has("maps") else {}
        return {"comparison": result.summary, **maps}


def strangers(scorers: Scorers, clip: str, scenes: bool) -> list[str]:
    """A remark where what looks at the pictures knows the scenes world, and the model does not."""
    known = [clip] * (clip == Score.clip) + ["the scenes parser"] * (scorers.parser is not None)
    told = f"scores of {' and '.join(known)} mean nothing here: drawn scenes alone are known to it"
    return [told] if known and not scenes else []


def adapt(model: MMDiT, scorers: Scorers, variant: str) -> None:
    """Make a variant's adapter the loaded one."""
    from mmdit_probe.models.adapters import load_adapter

    if scorers.loaded == variant:
        return
    if scorers.loaded != BASE:
        model.pipeline.unload_lora_weights()
    path = scorers.variants[variant]
    if path is not None:
        load_adapter(model.pipeline, path, _ADAPTER)
    scorers.loaded = variant


def scene_prompts(n: int, categories: Sequence[str] = (), split: str = "val") -> list[tuple[str, str]]:
    """(category, prompt): captions of `n` held-out scenes for each category of the world, of all if none is named."""
    chosen = named_of("category", categories, CATEGORIES) if categories else CATEGORIES
    return [(category, text) for category in chosen for text in captions(split, n, category, distinct=False)]


def prompts_by_category(source: str, n: int) -> list[tuple[str, str]]:
    """(category, prompt) pairs of a prompt source; of a folder, at most `n` of each text file."""
    if not os.path.isdir(source):  # False, not an error, for a prompt too long for a path
        return [("prompts", text) for text in prompts(source, n)]
    files = sorted(Path(source).glob("*.txt"))
    if not files:
        raise UserError(f"{source!r} has no text files; expected one per category, with one prompt per line")
    names = [file.stem.removesuffix("_val") for file in files]
    for name in names:
        if name in (EVERY, REAL) or names.count(name) > 1:
            why = "has two text files" if names.count(name) > 1 else "has a name that other rows of the tables have"
            raise UserError(f"category {name!r} of {source!r} {why}; expected one file per category, of another name")
    return [(name, text) for name, file in zip(names, files, strict=True) for text in prompts(str(file), n)]


def scored(frame: pd.DataFrame, pictures: Sequence[Any], scorers: Scorers) -> pd.DataFrame:
    """Rows of pictures with what every scorer says of each and its prompt: the parser's are those of `judge`."""
    from mmdit_probe.scenes.parser import judge

    texts = frame["prompt"].tolist()
    if scorers.parser is not None:
        readings = scorers.parser.read(pictures)
        frame = frame.join(pd.DataFrame(judge(*pair) for pair in zip(texts, readings, strict=True)))
    if scorers.clip is not None:
        cosines = scorers.clip.cosines(pictures, texts)
        frame[scorers.clip.metric] = [100 * max(0.0, float(value)) for value in cosines]
        frame[scorers.clip.cosine_metric] = [float(value) for value in cosines]
    if scorers.asker is not None:
        frame[scorers.asker.metric] = [float(value) for value in scorers.asker(pictures, texts)]
    return frame


def real_scenes(n: int, split: str, scorers: Scorers) -> pd.DataFrame:
    """The scorers' own limit: real scenes and their captions, scored as pictures are."""
    from PIL import Image

    items = [scene(split, index) for index in range(n)]
    texts = [describe(item) for item in items]
    frame = pd.DataFrame({"variant": BASE, "category": REAL, "prompt": texts, "index": range(n), "seed": range(n)})
    return scored(frame, [Image.fromarray(item.image) for item in items], scorers)


def export(picture: Any, folder: Path, prompt: str, number: int) -> None:
    """Write a picture as T2I-CompBench's evaluator wants it: `<prompt>_<number>.png`."""
    check_exportable(prompt)
    with atomic.replacing(folder / f"{prompt}_{number:06d}.png") as temporary:
        picture.save(temporary, format="PNG")


def check_exportable(prompt: str) -> None:
    """T2I-CompBench's evaluator reads the prompt back as the text of the file name before the first underscore.

    Raises:
        UserError: it cannot be such a name.
    """
    refused = "_/" + ('\\<>:"|?*' if sys.platform == "win32" else "")
    found = sorted(set(prompt) & set(refused))
    if found or len(os.fsencode(prompt)) > LONGEST:
        why = f"it has {' '.join(found)}" if found else f"it is longer than {LONGEST} bytes"
        raise UserError(f"prompt {prompt!r} cannot be a T2I-CompBench file name: {why}")


MARGINS = {"clipscore": 1.0, "clip_similarity": 0.01, "": 0.05}
"""Largest loss that does not matter: one point of CLIPScore, also where it is told as a cosine; .05 of the scores from
0 to 1. Of an opposite, such as swapped colours, it is the largest rise."""


def margin_of(metric: str) -> float:
    return next(margin for start, margin in MARGINS.items() if metric.startswith(start))


def sign_of(metric: str) -> float:
    """1 where more is better; -1 of an opposite, such as swapped colours, where less is."""
    return -1.0 if metric in CONTRASTS.values() else 1.0


def compare_variants(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Means per variant, category and metric, and paired differences to a baseline.

    Returns: columns variant, category ("all" for every prompt), metric, prompts (of the mean: different ones where the
    metric is defined; a caption that comes up twice, be it in two categories, is one), images, mean, low, high (95 %
    interval of the mean), difference, difference_low, difference_high; and, of variants other than the baseline,
    p_margin and p_holm (of the difference being -margin, and 0, corrected for the rows of a metric) and verdict
    (`statistics.judged` with `MARGINS`).

    Raises:
        UserError: unknown baseline, or a variant that was scored on other prompts or seeds.
    """
    names = list(dict.fromkeys(frame["variant"]))
    check_known("variant", baseline, names)
    metrics = [c for c in frame.columns if c not in ("variant", *KEYS)]
    wide = {name: frame[frame["variant"] == name].set_index(KEYS)[metrics].astype(float).sort_index() for name in names}
    for name, table in wide.items():
        if not table.index.equals(wide[baseline].index):
            raise UserError(f"variant {name!r} was scored on other prompts or seeds than {baseline!r}")
    shares = frame[metrics].astype(float).agg(["min", "max"]).T
    kinds: dict[Any, Kind] = {
        name: "share" if 0 <= ends["min"] <= ends["max"] <= 1 else "mean" for name, ends in shares.iterrows()
    }
    rows: list[dict[str, Any]] = []
    for name in names:
        for category in (EVERY, *dict.fromkeys(frame["category"])):
            chosen, base = (t if category == EVERY else t.loc[[category]] for t in (wide[name], wide[baseline]))
            for metric in metrics:
                own, other = (t[metric].groupby("prompt").mean().to_numpy() for t in (chosen, base))
                mean, low, high = interval(own, kinds[metric])
                sign = sign_of(metric)
                kind = "mean" if name == baseline else kind_of(own, other)  # from itself it cannot differ
                gain = no_worse(sign * (own - other), margin_of(metric), kind)
                ends = sorted((sign * gain.low, sign * gain.high))
                rows.append(
                    {
                        "variant": name, "category": category, "metric": metric, "prompts": len(defined(own)),
                        "images": len(chosen), "mean": mean, "low": low, "high": high, "difference": sign * gain.mean,
                        "difference_low": ends[0], "difference_high": ends[1], "p_margin": gain.p_margin,
                        "p_holm": gain.p,
                    }
                )  # fmt: skip
    return with_verdicts(pd.DataFrame(rows), baseline)


def with_verdicts(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The table of `compare_variants` with p values corrected and verdicts; rows of the baseline are no comparison."""
    tests = ["p_margin", "p_holm"]
    table = table.assign(**{name: table[name].mask(table["variant"] == baseline) for name in tests})
    table = corrected(table, tests, "metric")
    low, high, less = table["difference_low"], table["difference_high"], table["metric"].map(sign_of) < 0
    rows = table[tests].assign(
        n=table["prompts"], margin=table["metric"].map(margin_of), low=low.mask(less, -high), high=high.mask(less, -low)
    )
    return table.assign(verdict=np.where(table["variant"] == baseline, "", judged(rows)))


def variant_table(comparison: pd.DataFrame, metric: str, baseline: str) -> TextTable:
    """One metric: categories by row, variants by column, mean with interval and paired difference."""
    part = comparison[comparison.metric == metric]
    first, variants = part.iloc[0], list(dict.fromkeys(part.variant))
    columns = [c for name in variants for c in ((name,) if name == baseline else (name, f"{name} - {baseline}"))]
    title = f"{metric}: mean [95 % interval over prompts], differences paired; n = {counted(first.prompts, 'prompt')}"
    title += f", {counted(first.images, 'picture')}"
    table = TextTable(["category", *columns], left=("category",), spare=columns[:1:-1], title=title)
    for category in dict.fromkeys(part.category):
        cells = [str(category)]
        for name in variants:
            row = part[(part.variant == name) & (part.category == category)].iloc[0]
            cells.append(bounded(row["mean"], row["low"], row["high"]))
            if name != baseline:
                cells.append(signed(row.difference, row.difference_low, row.difference_high))
        table.add(*cells)
    return table


def verdict_lines(comparison: pd.DataFrame, metric: str, baseline: str) -> list[str]:
    """In which categories each variant is no worse than the baseline, in which worse, in which that is open."""
    lines = []
    part = comparison[(comparison["metric"] == metric) & (comparison["variant"] != baseline)]
    for variant, rows in part.groupby("variant", sort=False):
        told = [f"{verdict} in {', '.join(of['category'])}" for verdict, of in rows.groupby("verdict", sort=False)]
        how = f"margin {margin_of(metric):g}, corrected for {counted(len(part), 'comparison')} (Holm)"
        lines.append(f"{metric} of {variant} against {baseline}: {'; '.join(told)} ({how}).")
    return lines


def opposite_table(comparison: pd.DataFrame) -> TextTable:
    """What captions state beside its opposite: shares of pictures that show each, where captions state such a thing."""
    columns = [name for pair in CONTRASTS.items() for name in pair]
    title = "stated beside opposite: share of pictures [95 % interval over prompts] (prompts that state it)"
    names = [name.replace("_", " ") for name in columns]
    table = TextTable(["variant", "category", *names], left=("variant", "category"), title=title)
    for (variant, category), part in comparison.groupby(["variant", "category"], sort=False):
        rows = part.set_index("metric").loc[columns].to_dict("records")
        cells = [bounded(row["mean"], row["low"], row["high"]) for row in rows]
        if any(cells):
            told = (cell and f"{cell} ({row['prompts']})" for cell, row in zip(cells, rows, strict=True))
            table.add(str(variant), str(category), *told)
    return table


def map_table(maps: pd.DataFrame) -> TextTable:
    """mIoU of the I2T maps of the classes present, per stream and layer, head mean."""
    n, ceiling = int(maps["n"].iloc[0]), float(maps["ceiling"].iloc[0])
    means = map_cells(maps, ["stream", "layer"])
    title = (
        f"I2T maps of the classes present, argmax, upsampled: mIoU [95 % interval over {counted(n, 'scene')}],"
        f" token-grid ceiling {ceiling:.3f}"
    )
    names = [f"sigma {column[0]}, {'min-max' if column[1] else 'raw'}" for column in means.columns]
    table = TextTable(["text tokens", "layer", *names], left=("text tokens",), title=title)
    for key, row in zip(means.index.to_list(), means.to_numpy(), strict=True):
        table.add(*map(str, key), *row)
    return table


def map_cells(maps: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """The mIoU of maps averaged over heads, with its interval, as text: a column per sigma and min_max."""
    means = maps[maps["head"] == "mean"]
    cells = [bounded(*row) for row in means[["miou", "low", "high"]].to_numpy()]
    return means.assign(cell=cells).pivot(index=index, columns=["sigma", "min_max"], values="cell")
