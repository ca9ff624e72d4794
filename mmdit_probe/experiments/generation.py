"""Generation scores of a model and of its variants, on the same prompts and seeds.

    prompts = scene_prompts(20, ("colour", "numeracy"))
    frame = pd.concat([score(model, prompts, variant="base", parser=load_parser(), clip=clip), ...])
    compare(frame, baseline="base")          # per category: mean, paired difference, intervals, n

Differences between variants are small beside those between pictures, so that they are taken per (prompt, seed) and
averaged per prompt; intervals are over prompts, which are what a benchmark samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mmdit_probe.errors import UserError, unknown
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results.statistics import FEWEST, defined, interval

if TYPE_CHECKING:
    from mmdit_probe.evaluate.blip import BlipAsker
    from mmdit_probe.evaluate.clipscore import ClipScorer
    from mmdit_probe.scenes.parser import SceneParser

PARSED = ("facts", "all_right", "things_right", "grounds_right")
"""Scores of the scenes parser: share of the caption's facts that hold, and whether all, the objects, the grounds do."""

Prompts = Sequence[tuple[str, str]]
"""(category, prompt) pairs."""


def scene_prompts(n: int, categories: Sequence[str] = (), split: str = "val") -> list[tuple[str, str]]:
    """`n` held-out captions of each category of the scenes world (all categories if none is named)."""
    from mmdit_probe.scenes import CATEGORIES, captions

    for category in categories:
        if category not in CATEGORIES:
            raise unknown("category", category, CATEGORIES)
    return [
        (category, text)
        for category in (categories or CATEGORIES)
        for text in captions(split, n, category, distinct=False)
    ]


def score(
    model: MMDiT,
    prompts: Prompts,
    *,
    variant: str,
    images: int = 1,
    steps: int = 28,
    guidance: float = 7.5,
    seed: int = 0,
    parser: SceneParser | None = None,
    clip: ClipScorer | None = None,
    asker: BlipAsker | None = None,
    export: Path | None = None,
    batch: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Generate pictures and score them, one row per picture.

    Args:
        model: the model. prompts: (category, prompt) pairs. variant: what the rows are called.
        images: pictures per prompt; picture j of prompt k is drawn from seed + images k + j whatever the variant.
        parser: reads scenes back (columns `PARSED`). clip: CLIPScore and cosine, asker: P(yes) of
            the prompt's noun phrases (columns named after the model).
        export: also write the pictures in T2I-CompBench's layout, `<export>/<category>/samples/<prompt>_<number>.png`.
        advance: called after every batch of pictures with no argument.

    Returns: columns variant, category, prompt, index, seed, and the scores.
    """
    require(parser, clip, asker, export)
    jobs: list[dict[str, Any]] = [
        {"category": category, "prompt": text, "index": k, "seed": seed + images * k + j, "number": images * k + j}
        for k, (category, text) in enumerate(prompts)
        for j in range(images)
    ]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(jobs), batch):
        chunk = jobs[start : start + batch]
        texts = [str(job["prompt"]) for job in chunk]
        pictures = model.generate(texts, steps=steps, guidance=guidance, seed=[int(job["seed"]) for job in chunk])
        found = [{"variant": variant, **{k: v for k, v in job.items() if k != "number"}} for job in chunk]
        if parser is not None:
            found = [row | parsed for row, parsed in zip(found, _parsed(parser, texts, pictures), strict=True)]
        if clip is not None:
            cosines = clip.cosines(pictures, texts)
            found = [row | {clip.metric: 100 * max(0.0, float(value)), clip.cosine_metric: float(value)}
                     for row, value in zip(found, cosines, strict=True)]  # fmt: skip
        if asker is not None:
            answers = asker(pictures, texts)
            found = [row | {asker.metric: float(value)} for row, value in zip(found, answers, strict=True)]
        if export is not None:
            for job, picture in zip(chunk, pictures, strict=True):
                _export(picture, export / str(job["category"]) / "samples", str(job["prompt"]), int(job["number"]))
        rows += found
        advance()
    return pd.DataFrame(rows)


def require(*scorers: object) -> None:
    """Refuse to draw pictures that nothing would look at: all scorers (and the folder to export to) are None."""
    if all(scorer is None for scorer in scorers):
        raise UserError("nothing to score with: give a parser, a CLIP or BLIP model, or a folder to export to")


def compare(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Means per variant, category and metric, and paired differences to a baseline.

    Args:
        frame: rows of `score` of several variants.
        baseline: variant that differences are taken to.

    Returns:
        Columns variant, category ("all" for every prompt), metric, prompts (of the mean: those where the metric is
        defined), images, mean, low, high (95 % interval of the mean), difference, difference_low, difference_high,
        worse (the interval lies below zero, over enough prompts).

    Raises:
        UserError: unknown baseline, or a variant that was scored on other prompts or seeds.
    """
    names = list(dict.fromkeys(frame["variant"]))
    if baseline not in names:
        raise unknown("variant", baseline, names)
    keys = ["category", "index", "prompt", "seed"]
    metrics = [c for c in frame.columns if c not in ("variant", *keys)]
    wide = {name: frame[frame["variant"] == name].set_index(keys)[metrics].astype(float).sort_index() for name in names}
    for name, table in wide.items():
        if not table.index.equals(wide[baseline].index):
            raise UserError(f"variant {name!r} was scored on other prompts or seeds than {baseline!r}")
    rows: list[dict[str, Any]] = []
    categories = ["all", *dict.fromkeys(frame["category"])]
    for name in names:
        for category in categories:
            chosen = wide[name] if category == "all" else wide[name].loc[[category]]
            base = wide[baseline] if category == "all" else wide[baseline].loc[[category]]
            for metric in metrics:
                own = chosen[metric].groupby(["category", "index"]).mean().to_numpy()
                other = base[metric].groupby(["category", "index"]).mean().to_numpy()
                mean, low, high = interval(own)
                gain, gain_low, gain_high = interval(own - other)
                enough = len(defined(own - other)) >= FEWEST
                rows.append(
                    {
                        "variant": name, "category": category, "metric": metric, "prompts": len(defined(own)),
                        "images": len(chosen), "mean": mean, "low": low, "high": high, "difference": gain,
                        "difference_low": gain_low, "difference_high": gain_high,
                        "worse": bool(enough and gain_high < 0),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _parsed(parser: SceneParser, texts: Sequence[str], pictures: Sequence[Any]) -> list[dict[str, float]]:
    from mmdit_probe.scenes.parser import aligned, alignment, grounds_right, things_right

    functions = dict(zip(PARSED, (alignment, aligned, things_right, grounds_right), strict=True))
    return [
        {name: float(function(text, reading)) for name, function in functions.items()}
        for text, reading in zip(texts, parser.read(pictures), strict=True)
    ]


def _export(picture: Any, folder: Path, prompt: str, number: int) -> None:
    # The official evaluator reads the prompt back as the text before the first underscore.
    if "_" in prompt or "/" in prompt:
        raise UserError(f"prompt {prompt!r} cannot be a T2I-CompBench file name: it has an underscore or a slash")
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{prompt}_{number:06d}.png")
