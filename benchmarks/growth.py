"""How time, memory and disk grow with each thing that a run has more of: slopes, and what they come to for a million.

    python benchmarks/growth.py                           # benchmarks/results/growth-<kind>.{json,md}
    python benchmarks/growth.py --axis layers --axis heads --rounds 9

Axes of one forward, in blocks of SD3-medium size with random weights (1024 image and 333 text tokens, 2 layers of 24
heads x 64, batch 1, bfloat16), one varied at a time: image tokens, text tokens, layers, heads. `stock` is the bare
forward; what AttentionMass adds is timed within it, as in `scaling.py`. Axes of whole commands, on the embedded model:
prompts (`attention-budget`), images (`evaluate`), processes (`evaluate` in one and two, a thread each, by torchrun). A
command's slope is the time between a short and a long run, so that what starting costs is beside it, not in it; its
median is over `--repeats`. Axis of the bookkeeping: items, from ten to ten thousand prompts of a random model so small
that its forward hides nothing; memory, disk, and what summing up, opening and resuming the run take afterwards. An axis
that the result file has is not measured again.

The site's page "How it grows" ends with the result.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import overhead
import scaling
from overhead import CLOCKS, mebibytes
from sizes import TEXT, build

from mmdit_probe.errors import at_least, run_script

ROOT = Path(__file__).parents[1]
BASE = {"image tokens": 1024, "text tokens": TEXT["sd3-medium"], "layers": 2, "heads": 24}
FORWARD = {
    "image tokens": (256, 1024, 2304),
    "text tokens": (77, 154, 333, 512, 1024),
    "layers": (2, 4, 8),
    "heads": (6, 12, 24),
}
"""Values of each axis of a forward."""
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[int, int], tuple[int, ...]]] = {
    "prompts": (("attention-budget",), (1, 5), (1,)),
    "images": (("evaluate",), (8, 48), (1, 2)),
}
"""Each axis of a command: the command, a short and a long run, and numbers of processes."""
MANY = "many prompts"
"""The axis of the bookkeeping."""
ITEMS = (10, 100, 1000, 10_000)
LETTERS = str.maketrans("0123456789", "abcdefghij")
SD3_ROWS = 580_608
"""Rows of attention-budget for a prompt of SD3-medium: 28 steps, 2 branches, 24 layers x 24 heads, 18 kinds of pair."""
MILLION = 1_000_000


def of_forward(axis: str, device: str, rounds: int, clock: str) -> list[dict[str, Any]]:
    """A row for each value of an axis: seconds of the bare forward, and what the masses add."""
    rows = []
    for value in FORWARD[axis]:
        at = BASE | {axis: value}
        built = build(
            "sd3-medium", at["image tokens"], "bfloat16", device, at["heads"], at["layers"], at["text tokens"]
        )
        found = {row["way"]: row for row in scaling.measured(*built, ("stock", "masses"), device, rounds, clock)}
        rows.append({
            "axis": axis, "value": value, "stock": found["stock"]["seconds"], "ratio": found["masses"]["ratios"][clock],
            "added": found["masses"]["added_seconds"], "stock_bytes": found["stock"]["added_bytes"],
            "masses_bytes": found["masses"]["added_bytes"], "rounds": rounds,
        })  # fmt: skip
    return rows


def of_command(axis: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each number of items and of processes: median seconds by both clocks, rows and bytes on disk."""
    command, counts, processes = COMMANDS[axis]
    rows = []
    for number in processes:
        for count in counts:
            line = [*command, "--limit", str(count), "--device", device, "--quiet"]
            runs = [once(line, number) for _ in range(repeats)]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({"axis": axis, "value": count, "processes": number, "repeats": repeats, **middle})
    return rows


def of_items(counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of prompts of a tiny model; one prompt before them, for what is loaded and made once."""
    sys.path.insert(0, str(ROOT))
    from tests import tiny

    model = tiny.pipeline()
    for count in (1, *counts):
        with tempfile.TemporaryDirectory() as folder:
            row = of_run(model, count, Path(folder) / "run")
        if count > 1:
            yield row


def of_run(model: Any, count: int, out: Path) -> dict[str, Any]:
    """One denoising step a prompt, rows by layer: processor seconds to measure, sum up, open and resume; resident
    memory when all are measured, and when all is done; bytes and files."""
    import psutil

    from mmdit_probe.experiments import AttentionBudget, Result

    at = []

    def reached() -> None:
        at.append((time.process_time(), psutil.Process().memory_info().rss))

    class Watched(AttentionBudget):
        def finish(self, study: Any, store: Any) -> None:
            reached()

    prompts = [f"cat {f'{number:04d}'.translate(LETTERS)}" for number in range(count)]
    asked = Watched(prompts=prompts, num_steps=1, rows="layer")
    reached()
    asked.run(model, out=out, progress=False)
    reached()
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    reached()
    assert len(Result.read(out).summary)
    reached()
    asked.run(model, out=out, resume=True, progress=False)
    reached()
    seconds, resident = zip(*at, strict=True)
    return {
        "axis": MANY, "value": count, "measured": seconds[1] - seconds[0], "summed_up": seconds[2] - seconds[1],
        "opened": seconds[4] - seconds[3], "resumed": seconds[5] - seconds[4], "resident": resident[1],
        "after": resident[5], "bytes": size, "files": len(files),
    }  # fmt: skip


def once(line: list[str], processes: int) -> dict[str, float]:
    """Wall and processor seconds of a command, and the rows and bytes of its largest table."""
    launcher = ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        whole = [sys.executable, "-m", *launcher, "mmdit_probe", *line, "--out", str(out)]
        begin, spent = time.perf_counter(), of_children()
        subprocess.run(whole, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = {"wall": time.perf_counter() - begin, "cpu": of_children() - spent}
        return found | largest_table(out)


def of_children() -> float:
    """Processor seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def largest_table(folder: Path) -> dict[str, float]:
    import pyarrow.dataset as data

    sizes = {}
    for table in folder.glob("*.parquet"):
        files = [table] if table.is_file() else list(table.rglob("*.parquet"))
        sizes[table] = sum(file.stat().st_size for file in files)
    if not sizes:
        return {"rows": 0, "bytes": 0}
    largest = max(sizes, key=sizes.__getitem__)
    return {"rows": data.dataset(largest, format="parquet").count_rows(), "bytes": sizes[largest]}


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """p of value ~ axis ** p between the smallest and the largest value of an axis."""
    low, high = rows[0], rows[-1]
    return math.log(high[key] / low[key]) / math.log(high["value"] / low["value"])


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Of one more item, between the short and the long run."""
    low, high = rows
    return (high[key] - low[key]) / (high["value"] - low["value"])


def markdown(report: dict[str, Any]) -> str:
    lines = ["## What was measured", "", "Made by `python benchmarks/growth.py`."]
    lines += [f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}."]
    axes = {axis: [row for row in report["rows"] if row["axis"] == axis] for axis in (*FORWARD, *COMMANDS, MANY)}
    if any(axes[axis] for axis in FORWARD):
        lines += ["", *forward_table({axis: axes[axis] for axis in FORWARD if axes[axis]})]
    for axis in COMMANDS:
        if axes[axis]:
            lines += ["", *command_table(axis, axes[axis], report["clock"])]
    if axes[MANY]:
        lines += ["", *items_table(axes[MANY])]
    if axes["prompts"]:
        lines += ["", *million(axes["prompts"], report["clock"])]
    return "\n".join(lines) + "\n"


def forward_table(axes: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One forward: every value of every axis, and its exponent."""
    lines = ["### One forward", ""]
    base = ", ".join(f"{number} {name}" for name, number in BASE.items())
    lines += [f"Blocks of SD3-medium size; what is not varied is at {base}.",
              "p: exponent of the seconds in that axis, smallest to largest value.", ""]  # fmt: skip
    lines += ["| axis | value | rounds | stock s | masses add s | masses / stock | stock MiB | with masses MiB |",
              "|-|-:|-:|-:|-:|-:|-:|-:|"]  # fmt: skip
    for axis, rows in axes.items():
        for row in rows:
            middle, (low, high) = row["ratio"]
            cells = (axis, str(row["value"]), str(row["rounds"]), f"{row['stock']:.3f}", f"{row['added']:.4f}")
            cells += (f"{middle:.3f} [{low:.3f}, {high:.3f}]", mebibytes(row["stock_bytes"]))
            lines.append("| " + " | ".join((*cells, mebibytes(row["masses_bytes"]))) + " |")
        lines.append(f"| {axis} | **p** | | {exponent(rows, 'stock'):.2f} | {exponent(rows, 'added'):.2f} | | | |")
    return lines


def command_table(axis: str, rows: list[dict[str, Any]], clock: str) -> list[str]:
    """A whole command on the embedded model, and the slope of each number of processes."""
    command = " ".join(COMMANDS[axis][0])
    lines = [f"### {axis.capitalize()}: `{command}` on the embedded model", ""]
    lines += ["| processes | " + axis + " | runs | wall s | processor s | rows | bytes |", "|-:|-:|-:|-:|-:|-:|-:|"]
    for row in rows:
        cells = (row["processes"], row["value"], row["repeats"], f"{row['wall']:.1f}", f"{row['cpu']:.1f}")
        lines.append("| " + " | ".join(map(str, (*cells, round(row["rows"]), round(row["bytes"])))) + " |")
    lines.append("")
    pairs = {number: [row for row in rows if row["processes"] == number] for number in COMMANDS[axis][2]}
    for number, pair in pairs.items():
        lines.append(
            f"* {number} process{'es' * (number > 1)}: {slope(pair, 'wall'):.3f} s by the wall clock and"
            f" {slope(pair, 'cpu'):.3f} s of processor time for one more, {slope(pair, 'bytes'):.0f} bytes"
        )
    if len(pairs) > 1:
        (one, first), *_, (most, last) = pairs.items()
        whole, more = first[-1]["wall"] / last[-1]["wall"], slope(first, "wall") / slope(last, "wall")
        lines.append(
            f"* {most} processes against {one}, a thread each: {more:.2f} times the images a second; {whole:.2f} for"
            f" the whole command of {first[-1]['value']} images, with its start"
        )
    return lines


def items_table(rows: list[dict[str, Any]]) -> list[str]:
    """Ten to ten thousand prompts: what of the bookkeeping grows, and how."""
    lines = [
        f"### {MANY.capitalize()}: `attention-budget` on a tiny random model", "",
        "One step a prompt, `--rows layer`, all runs in one process; processor seconds. 'summed up': summary, figure,",
        "record when all are measured; 'opened': `Result.read(folder).summary`; 'resumed': `--resume` of the finished",
        "run, figure included. MiB: resident when all are measured, and after all of that.", "",
        "| prompts | measured s | a prompt | MiB | bytes a prompt | files | summed up s | opened s | resumed s | MiB |",
        "|-:|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]  # fmt: skip
    for row in rows:
        cells = (row["value"], f"{row['measured']:.1f}", f"{row['measured'] / row['value']:.4f}")
        cells += (mebibytes(row["resident"]), f"{row['bytes'] / row['value']:.0f}", row["files"])
        cells += tuple(f"{row[name]:.2f}" for name in ("summed_up", "opened", "resumed"))
        lines.append("| " + " | ".join(map(str, (*cells, mebibytes(row["after"])))) + " |")
    return lines


def million(rows: list[dict[str, Any]], clock: str) -> list[str]:
    """What the measured slopes come to for a million prompts."""
    seconds, of_row = slope(rows, clock), slope(rows, "bytes") / slope(rows, "rows")
    lines = ["### A million prompts", "", "| | rows | bytes | one machine | 100 machines |", "|-|-:|-:|-:|-:|"]
    mine = slope(rows, "rows") * MILLION
    hours = seconds * MILLION / 3600
    lines.append(
        f"| embedded model, measured slope | {mine:.2e} | {mine * of_row:.2e} | {hours:.0f} h | {hours / 100:.1f} h |"
    )
    sd3 = SD3_ROWS * MILLION
    lines.append(f"| SD3-medium, at {of_row:.2f} bytes a row as measured | {sd3:.2e} | {sd3 * of_row:.2e} | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", choices=(*FORWARD, *COMMANDS, MANY), action="append", help="default: all")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="runs of each command")
    overhead.common_options(parser, rounds=7)
    options = parser.parse_args()
    stem = overhead.results("growth", options.device)
    report = overhead.kept(stem, overhead.described(options.device, options.clock))
    for axis in options.axis or (*FORWARD, *COMMANDS, MANY):
        if not options.fresh and any(row["axis"] == axis for row in report["rows"]):
            print(f"{axis}: in {stem.name}.json already; --fresh measures it again")
            continue
        report["rows"] = [row for row in report["rows"] if row["axis"] != axis]
        if axis in FORWARD:
            report["rows"] += of_forward(axis, options.device, options.rounds, options.clock)
        elif axis == MANY:
            report["rows"] += of_items(ITEMS)
        else:
            report["rows"] += of_command(axis, options.device, options.repeats)
        if options.no_write:
            print(markdown(report))
        else:
            overhead.write(stem, report, markdown(report))
            print(f"{axis} written: {stem}.json, {stem}.md", flush=True)


if __name__ == "__main__":
    run_script(main)
