"""How good is the embedded model? What its images show, where its words look, and the same for its random-weight twin.

    python analyses/embedded_model.py            # about half an hour on two cores
    python analyses/embedded_model.py --n 20     # a quick look

Writes `analyses/results/embedded_model/{alignment,maps}.csv` and `summary.md`. Run it again after the checkpoint was
replaced: nothing else states these numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mmdit_probe import load
from mmdit_probe.embedded.report import SCORES, interval, score_model
from mmdit_probe.results import read_table
from mmdit_probe.scenes import CATEGORIES

OUT = Path(__file__).parent / "results" / "embedded_model"
MODELS = {"scenes-sd3": (*CATEGORIES, "real"), "scenes-sd3-random": ("colour",)}
"""What to draw images for; the twin draws noise, one category shows it."""


def alignment_table(images: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % bootstrap interval over images per model and caption category."""
    rows = []
    for (model, category), part in images.groupby(["model", "category"], sort=False):
        row: dict[str, object] = {"model": model, "category": category, "n": len(part)}
        for name in SCORES:
            row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(part[name].astype(float))
        rows.append(row)
    return pd.DataFrame(rows)


def as_markdown(alignment: pd.DataFrame, maps: pd.DataFrame, guidance: float, num_steps: int) -> str:
    """Both tables for people."""
    lines = [
        "# The embedded model, measured",
        "",
        "Written by `python analyses/embedded_model.py`; every number is from the checkpoint in `mmdit_probe/assets`.",
        "",
        f"Images generated from held-out captions ({num_steps} steps, guidance {guidance}), read back by the scene",
        "parser: share of images where it holds, with the 95 % bootstrap interval over images. `real` is the parser's",
        "own limit: true captions of real held-out scenes.",
        "",
        "| model | category | n | objects and colours right | ground right | all facts | share of facts |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in alignment.to_dict("records"):
        cells = [
            f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
            for name in ("things_right", "grounds_right", "all_right", "facts")
        ]
        lines.append(f"| {row['model']} | {row['category']} | {row['n']} | " + " | ".join(cells) + " |")
    sigma, n, ceiling = (maps[name].iloc[0] for name in ("sigma", "n", "ceiling"))
    lines += [
        "",
        f"I2T maps of the classes present in {n} held-out scenes at sigma {sigma}: argmax, upsampled, mIoU. No map of",
        f"this token grid can pass {ceiling:.3f}.",
        "",
        "| model | layer | head mean, raw | head mean, divided by its spatial mean | best single head, raw |",
        "|-|-|-|-|-|",
    ]
    for (model, layer), part in maps.groupby(["model", "layer"], sort=False):
        scores = part.set_index(["head", "normalised"])["miou"]
        single = part[(part["head"] != "mean") & ~part["normalised"]]["miou"].max()
        mean = (scores["mean", False], scores["mean", True])
        lines.append(f"| {model} | {layer} | {mean[0]:.3f} | {mean[1]:.3f} | {single:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="captions per category, and scenes")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    images, maps = [], []
    for name, categories in MODELS.items():
        request = {
            "n": options.n,
            "guidance": options.guidance,
            "num_steps": options.num_steps,
            "sigma": options.sigma,
            "split": "test",
            "seed": 0,
        }
        report = score_model(load(name, device=options.device), request, categories=categories, resume=True)
        images.append(read_table(report.path / "alignment.parquet").assign(model=name))
        maps.append(read_table(report.path / "maps.parquet").assign(model=name))
    options.out.mkdir(parents=True, exist_ok=True)
    alignment = alignment_table(pd.concat(images))
    every_map = pd.concat(maps)
    alignment.to_csv(options.out / "alignment.csv", index=False, float_format="%.4f")
    every_map.to_csv(options.out / "maps.csv", index=False, float_format="%.4f")
    text = as_markdown(alignment, every_map, options.guidance, options.num_steps)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
