"""How long diffseg and diffcut take, and what pooling trades: made-up attention and features of known regions.

    python benchmarks/clustering.py                     # writes benchmarks/results/clustering.{json,md}
    python benchmarks/clustering.py --grid 32 --no-write

No model: regions of random shape, features and attention maps around them with noise, at 16 x 16 to 64 x 64 tokens (the
size of SD3 at 1024 pixels). `diffcut` cuts a graph of at most 32 x 32 pooled nodes and assigns at the full grid; `no
pooling` cuts the full graph. `diffseg` compares 256 anchors with all maps; `diffseg, 4 x anchors` compares 1024. The
dense row is the eigenvector as the official code finds it (all eigenvalues of the full graph, once). Agreement: mIoU of
the segments, matched, with the made-up regions. Target: seconds at 64 x 64 tokens on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from overhead import machine

from mmdit_probe.errors import at_least, run_script
from mmdit_probe.evaluate import segmentation_score
from mmdit_probe.segment import Capture
from mmdit_probe.segment.methods import find

RESULTS = Path(__file__).parent / "results"
GRIDS = (16, 32, 64)
REGIONS, WIDTH, NOISE = 24, 256, 1.5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "diffseg": ("diffseg", {}),
    "diffseg, 4 x anchors": ("diffseg", {"anchors": 32}),
    "diffseg, k-means after": ("diffseg", {"kmeans": True}),
    "diffcut": ("diffcut", {}),
    "diffcut, no pooling": ("diffcut", {"pool": 64}),
}


def world(side: int, seed: int = 0) -> tuple[Capture, np.ndarray]:
    """A capture of side x side tokens around random regions, and the regions."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.rand(REGIONS, 2, generator=generator) * side
    truth = ((y[..., None] - places[:, 0]) ** 2 + (x[..., None] - places[:, 1]) ** 2).argmin(-1).flatten()
    basis = torch.randn(REGIONS, WIDTH, generator=generator)
    features = basis[truth] + NOISE * torch.randn(side * side, WIDTH, generator=generator)
    near = torch.exp(-((y.flatten()[:, None] - y.flatten()) ** 2 + (x.flatten()[:, None] - x.flatten()) ** 2) / side**2)
    same = (truth[:, None] == truth[None]).float()
    attention = near * (0.1 + same) * (1 + NOISE * torch.rand(side**2, side**2, generator=generator))
    attention = 0.6 * attention / attention.sum(1, keepdim=True)
    return Capture.of(grid=(side, side), i2i=attention, features=features), truth.reshape(side, side).numpy()


def agreement(truth: np.ndarray, found: np.ndarray) -> float:
    """mIoU of segments with regions, matched within the picture."""
    return segmentation_score(found, truth, REGIONS, match="image").miou


def dense(one: Capture) -> None:
    """One bipartition as the official code solves it."""
    nodes = torch.nn.functional.normalize(one.features("feat_proj"), dim=-1).double()
    affinity = ((nodes @ nodes.T).clamp(min=0)) ** 5
    scale = affinity.sum(1) ** -0.5
    torch.linalg.eigh(affinity * scale[:, None] * scale[None])


def timed(call: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Least seconds of some rounds, and the last answer."""
    best, answer = float("inf"), None
    for _ in range(rounds):
        start = time.perf_counter()
        answer = call()
        best = min(best, time.perf_counter() - start)
    return best, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=at_least(1), action="append", help="tokens along a side; default: 16, 32, 64")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    for side in options.grid or GRIDS:
        one, truth = world(side)
        for label, (name, values) in CASES.items():
            method = find(name).configure(values)
            seconds, maps = timed(lambda method=method, one=one: method(one), options.rounds)
            found = maps.argmax(0).numpy()
            rows.append({"grid": side, "case": label, "seconds": seconds, "segments": int(np.unique(found).size),
                         "miou": agreement(truth, found)})  # fmt: skip
            print(rows[-1])
        rows.append(
            {"grid": side, "case": "dense eigenvectors, one cut", "seconds": timed(lambda one=one: dense(one), 1)[0]}
        )
        print(rows[-1])
    report = {
        "machine": machine("cpu")[0], "torch": torch.__version__,
        "threads": torch.get_num_threads(), "regions": REGIONS, "rounds": options.rounds, "rows": rows,
    }  # fmt: skip
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "clustering.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "clustering.md").write_text(markdown(report), encoding="utf-8")
        print(f"written: {RESULTS / 'clustering'}.json, .md")


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    lines = [
        f"# Clustering: {report['machine']}, torch {report['torch']}, {report['threads']} threads", "",
        f"Least of {report['rounds']} rounds; {report['regions']} made-up regions; mIoU of the segments with them.", "",
        "| tokens | case | seconds | segments | mIoU |", "|-|-|-|-|-|",
    ]  # fmt: skip
    for row in report["rows"]:
        rest = f"{row['segments']} | {row['miou']:.2f}" if "miou" in row else " | "
        lines.append(f"| {row['grid']} x {row['grid']} | {row['case']} | {row['seconds']:.2f} | {rest} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
