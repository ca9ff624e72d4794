"""How the cost of observing and editing grows with the image: time and peak memory at 1024, 4096 and 9216 image tokens.

    python benchmarks/scaling.py                              # benchmarks/results/scaling-<kind>.{json,md,png,pdf}
    python benchmarks/scaling.py --device cuda                # <kind>: of the processor or GPU
    python benchmarks/scaling.py --blocks flux --tokens 1024 --rounds 3 --dtype float32 --no-write

Blocks of the real sizes with random weights: two of SD3-medium (24 heads x 64, 333 text tokens) and one double and one
single of Flux.1 (24 heads x 128, 512 text tokens), batch 1, bfloat16 unless told otherwise. Ways, against the stock
forward of the same round:

    masses      AttentionMass                     target 1.05
    norms       AttentionMass and ValueNorm       target 1.05
    maps        head-mean maps of all text tokens target 1.10
    words       per-head maps of four positions   no target
    blur        text-axis blur of I2T             target 1.05
    explicit    softmax(q k^T) held in float32    what is usually done; left out where it does not fit

Times are taken in turns, by the wall clock (CUDA: device events) and in processor time; `--clock` says which of them
decides. Ratios are medians of per-round ratios with a 95 % interval (order statistics); a target is met or missed where
the interval lies on one side of it, else it is undecided. Beside it stands an inner measure, on a CPU: the ratio of a
forward to what it is without the observers' own time (`within`), which noise between two forwards does not touch. It
leaves out the catching of calls, which is less than a millisecond a layer (`watched` of `overhead.py`). Blocks are
built in their dtype. Peak memory is that of a first, untimed forward
of each way: the peak allocation on CUDA, elsewhere the peak resident set, which Linux can reset (where it cannot,
memory is left out). A cell (blocks, tokens, dtype) that the result file has is not measured again, so a stopped run
goes on; `--fresh` measures anew.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from overhead import CLOCKS, Dropped, machine, ratio, results, timed, verdict
from sizes import SIZES, TEXT, build

WAYS = ("stock", "masses", "norms", "maps", "words", "blur", "explicit")
TARGETS = {"masses": 1.05, "norms": 1.05, "maps": 1.10, "blur": 1.05}
BLOCKS = ("sd3-medium", "flux")
TOKENS = (1024, 4096, 9216)
OBSERVING = ("masses", "norms", "maps", "words")


class Spent:
    """Seconds that observers take: all of `observe` and `end_call`, which a CPU runs at once.

    Args:
        clock: as in `timed`.
    """

    def __init__(self, clock: str) -> None:
        self.seconds = 0.0
        self._now = time.process_time if clock == "cpu" else time.perf_counter

    def watch(self, observer: Any) -> None:
        for name in ("observe", "end_call"):
            setattr(observer, name, functools.partial(self._timed, getattr(observer, name)))

    def _timed(self, method: Callable[[Any], None], argument: Any) -> None:
        begin = self._now()
        method(argument)
        self.seconds += self._now() - begin


@contextlib.contextmanager
def attached(way: str, transformer: Any, spent: Spent | None = None) -> Iterator[None]:
    """The transformer with one way of looking at it, or of changing it, attached; `spent` watches the observers."""
    from mmdit_probe import AttentionMass, TextMaps, ValueNorm, probe
    from mmdit_probe.attention.intercept import watch
    from mmdit_probe.edit import Blur
    from mmdit_probe.models.families.registry import family_of
    from mmdit_probe.models.layout import find_layers

    with contextlib.ExitStack() as stack:
        if way == "explicit":
            for layer in find_layers(family_of(transformer), transformer):
                stack.callback(watch(layer.module, explicit_softmax, "output"))
        elif way == "blur":
            stack.enter_context(probe(transformer, edits=Blur("image", "text", layers="all")))
        elif way != "stock":
            observers: list[Any] = {
                "masses": lambda: [AttentionMass(Dropped())],
                "norms": lambda: [AttentionMass(Dropped()), ValueNorm(Dropped())],
                "maps": lambda: [TextMaps()],
                "words": lambda: [TextMaps(words=[3, 4, 5, 6], heads="all")],
            }[way]()
            if spent is not None:
                for observer in observers:
                    spent.watch(observer)
            stack.enter_context(probe(transformer, *observers))
        yield


def explicit_softmax(call: Any, module_call: Any, proceed: Any) -> Any:
    """Attention with the N x N probabilities of all heads in memory."""
    import torch

    from mmdit_probe.attention import reference

    attention = reference.probabilities(call.query, call.key, dtype=torch.float32)
    return (attention @ call.value.float()).to(call.value.dtype)


def fits(way: str, blocks: str, tokens: int, device: str, heads: int | None = None) -> bool:
    """Whether the explicit softmax (three float32 N x N matrices for every head) fits into the memory there is."""
    import torch

    if way != "explicit":
        return True
    needed = 3 * 4 * (heads or SIZES[blocks][1]["num_attention_heads"]) * (tokens + TEXT[blocks]) ** 2
    if device.startswith("cuda"):
        return needed < torch.cuda.mem_get_info(device)[0]
    return needed < 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak(forward: Callable[[], Any], device: str) -> int | None:
    """Peak memory in bytes while `forward` runs; None where the system cannot tell."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier forwards freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except (OSError, AttributeError):
        return None
    forward()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def measure(
    blocks: str, tokens: int, dtype: str, device: str, rounds: int, clock: str, heads: int | None = None
) -> list[dict[str, Any]]:
    """One row for every way that fits: median seconds, time and peak memory against stock."""
    transformer, forward = build(blocks, tokens, dtype, device, heads)
    ways = [way for way in WAYS if fits(way, blocks, tokens, device, heads)]
    seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in CLOCKS}
    own: dict[str, list[float]] = {way: [] for way in OBSERVING if way in ways and not device.startswith("cuda")}
    peaks: dict[str, int | None] = {}
    forward()  # what only a first forward allocates is no way's own
    for way in ways:
        with attached(way, transformer):
            peaks[way] = peak(forward, device)
    for turn in range(rounds):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            spent = Spent(clock)
            with attached(way, transformer, spent):
                for name, passed in timed(forward, device).items():
                    seconds[name][way].append(passed)
            if way in own:
                own[way].append(spent.seconds)
    cell = {"blocks": blocks, "image_tokens": tokens, "text_tokens": TEXT[blocks], "dtype": dtype, "rounds": rounds}
    (other,) = CLOCKS.keys() - {clock}
    rows = [cell | row for row in ratios(seconds[clock], peaks, own)]
    for row in rows:
        row["other_ratio"], row["other_interval"] = ratio(seconds[other][row["way"]], seconds[other]["stock"])
    return rows


def ratios(
    seconds: dict[str, list[float]], peaks: dict[str, int | None], own: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Per way: median seconds, what it adds to stock, the ratios, and whether each target is met.

    Args:
        own: seconds of each forward that the observers took, where that is known.
    """
    rows = []
    stock = peaks["stock"]
    for way, values in seconds.items():
        added = [mine - base for mine, base in zip(values, seconds["stock"], strict=True)]
        top, target = peaks[way], TARGETS.get(way)
        memory = None if top is None or stock is None else top / stock
        time_ratio, interval = ratio(values, seconds["stock"])
        within = None
        if way in own:
            within = statistics.median(whole / (whole - part) for whole, part in zip(values, own[way], strict=True))
            added = own[way]
        rows.append(
            {
                "way": way, "seconds": statistics.median(values), "added_seconds": statistics.median(added),
                "time_ratio": time_ratio, "time_ratio_interval": interval, "within": within,
                "peak_bytes": top, "peak_ratio": memory, "target": target,
                "verdict": verdict(interval, target),
                "memory_met": None if target is None or memory is None else memory <= target,
            }
        )  # fmt: skip
    return rows


def growth(rows: list[dict[str, Any]], blocks: str, dtype: str, way: str, key: str) -> float | None:
    """Exponent p of value ~ (image tokens) ** p between the smallest and the largest image; None of one size."""
    mine = (row for row in rows if (row["blocks"], row["dtype"], row["way"]) == (blocks, dtype, way))
    points = sorted((row["image_tokens"], row[key]) for row in mine if row[key] and row[key] > 0)
    if len(points) < 2:
        return None
    (n, low), (m, high) = points[0], points[-1]
    return math.log(high / low) / math.log(m / n)


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    missed = [row for row in rows if row["verdict"] == "missed" or row["memory_met"] is False]
    met = sum(row["verdict"] == "met" and row["memory_met"] is not False for row in rows)
    judged = sum(row["target"] is not None for row in rows)
    lines = [
        "# Cost of observing and editing at real block sizes",
        "",
        "Made by `python benchmarks/scaling.py`, which says what the ways are.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}.",
        "Ratios are against the stock forward of the same round, median and 95 % interval over rounds, which decides;",
        "'other clock': the same in processor time (or by the wall clock). 'within' is the same forward with and",
        "without the observers' own time, 'added s' that time.",
        "",
        f"Targets: {met} of {judged} cells met in time and memory, {len(missed)} missed, {judged - met - len(missed)} "
        "undecided." + ("" if not missed else " Missed: " + ", ".join(_cell(row) for row in missed) + "."),
        "",
        "| blocks | dtype | image tokens | way | s / forward | added s | time ratio | other clock | within | "
        "peak ratio | target | |",
        "|-|-|-:|-|-:|-:|-:|-:|-:|-:|-:|-|",
    ]
    for row in rows:
        spread, beside = (
            f"{row[name]:.3f} [{row[of][0]:.3f}, {row[of][1]:.3f}]"
            for name, of in (("time_ratio", "time_ratio_interval"), ("other_ratio", "other_interval"))
        )
        memory = "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}"
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        told = "missed" if row in missed else row["verdict"]
        cells = (
            row["blocks"], row["dtype"], str(row["image_tokens"]), row["way"], f"{row['seconds']:.3f}",
            f"{row['added_seconds']:.4f}", spread, beside,
            "-" if row["within"] is None else f"{row['within']:.3f}", memory, target, told,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Growth: exponent p of seconds ~ (image tokens) ** p, smallest to largest image.", ""]
    lines += ["| blocks | dtype | way | whole forward | what the way adds |", "|-|-|-|-:|-:|"]
    for blocks, dtype in dict.fromkeys((row["blocks"], row["dtype"]) for row in rows):
        for way in WAYS:
            whole, added = (growth(rows, blocks, dtype, way, key) for key in ("seconds", "added_seconds"))
            if whole is not None:
                shown = "-" if added is None or way == "stock" else f"{added:.2f}"
                lines.append(f"| {blocks} | {dtype} | {way} | {whole:.2f} | {shown} |")
    absent = report["skipped"]
    lines += ["", *(f"* {text}" for text in absent)] if absent else []
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    memory = "" if row["memory_met"] is not False else f", {row['peak_ratio']:.3f}x memory"
    return f"{row['blocks']} {row['dtype']} {row['image_tokens']} {row['way']} ({row['time_ratio']:.3f}x time{memory})"


def plot(rows: list[dict[str, Any]]) -> Any:
    """Time ratio with its targets, seconds and memory against image tokens; one column for each kind of block."""
    from matplotlib.ticker import LogLocator, NullLocator

    from mmdit_probe.plots import style

    kinds = list(dict.fromkeys((row["blocks"], row["dtype"]) for row in rows))
    colours = dict(
        zip(WAYS, ("#000000", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00"), strict=True)
    )
    marks = dict(zip(WAYS, "os^vDPX", strict=True))
    with style.context():
        figure = style.figure(max(3.4, 2.6 * len(kinds)), 5.4)
        axes = figure.subplots(3, len(kinds), squeeze=False, sharex=True)
        shown = [("time_ratio", "time / stock", 1.0), ("seconds", "seconds per forward", 1.0),
                 ("peak_bytes", "peak memory, GiB", 2.0**30)]  # fmt: skip
        for column, (blocks, dtype) in enumerate(kinds):
            for line, (key, label, unit) in enumerate(shown):
                axis = axes[line, column]
                for way in WAYS:
                    if key == "time_ratio" and way in ("stock", "explicit"):
                        continue  # the explicit softmax is far off this scale; its seconds are below
                    mine = (row for row in rows if (row["blocks"], row["dtype"], row["way"]) == (blocks, dtype, way))
                    part = sorted((row["image_tokens"], row[key] / unit) for row in mine if row[key])
                    if part:
                        axis.plot(*zip(*part, strict=True), marker=marks[way], markersize=3.5, linewidth=1,
                                  color=colours[way], label=way)  # fmt: skip
                if key == "time_ratio":
                    for target in sorted(set(TARGETS.values())):
                        axis.axhline(target, color="#999999", linewidth=0.6, linestyle=":")
                else:
                    axis.set_yscale("log")
                    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
                    axis.yaxis.set_major_formatter("{x:g}")
                    axis.yaxis.set_minor_locator(NullLocator())
                axis.set_xscale("log", base=2)
                axis.set_xticks(sorted({row["image_tokens"] for row in rows}))
                axis.xaxis.set_major_formatter("{x:.0f}")
                axis.set_ylabel(label if column == 0 else "")
                axis.set_title(f"{blocks}, {dtype}" if line == 0 else "")
                axis.set_xlabel("image tokens" if line == 2 else "")
        handles, labels = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", choices=BLOCKS, action="append", help="default: both")
    parser.add_argument("--tokens", type=int, action="append", help="image tokens, a square number; default: all three")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="of each cell; below six there is no verdict")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, on a busy machine")
    parser.add_argument("--fresh", action="store_true", help="measure cells that the result file has, too")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()

    import torch

    stem = results("scaling", options.device)
    report: dict[str, Any] = {
        "machine": machine(options.device)[0], "torch": torch.__version__, "threads": torch.get_num_threads(),
        "clock": options.clock, "rows": [], "skipped": [],
    }  # fmt: skip
    if stem.with_suffix(".json").exists() and not options.no_write:
        before = json.loads(stem.with_suffix(".json").read_text())
        if all(before[key] == report[key] for key in ("machine", "torch", "threads", "clock")):
            report = before  # cells of another machine or library are no company for these
    for blocks in options.blocks or BLOCKS:
        for tokens in options.tokens or TOKENS:
            cell = (blocks, tokens, options.dtype)
            of_cell = [row for row in report["rows"] if (row["blocks"], row["image_tokens"], row["dtype"]) == cell]
            if of_cell and not options.fresh:
                print(f"{blocks} {tokens} {options.dtype}: in {stem.name}.json already; --fresh measures it again")
                continue
            report["rows"] = [row for row in report["rows"] if row not in of_cell]
            found = measure(blocks, tokens, options.dtype, options.device, options.rounds, options.clock)
            report["rows"] = sorted(report["rows"] + found, key=_order)
            for row in found:
                memory = "" if row["peak_ratio"] is None else f", {row['peak_ratio']:.3f}x memory"
                within = "" if row["within"] is None else f" ({row['within']:.3f}x within)"
                told = f"{row['time_ratio']:.3f}x time{within}{memory} {row['verdict']}"
                print(f"{blocks} {tokens} {row['way']}: {told}", flush=True)
            remark = f"explicit softmax left out at {blocks}, {tokens} image tokens: it does not fit into memory"
            if all(row["way"] != "explicit" for row in found) and remark not in report["skipped"]:
                report["skipped"].append(remark)
            if not options.no_write:
                stem.parent.mkdir(exist_ok=True)
                part = stem.with_suffix(".json.tmp")
                part.write_text(json.dumps(report, indent=2) + "\n")
                os.replace(part, stem.with_suffix(".json"))
    if options.no_write:
        return
    from mmdit_probe.plots import save

    stem.with_suffix(".md").write_text(markdown(report))
    print("written:", stem.with_suffix(".json"), stem.with_suffix(".md"), *save(plot(report["rows"]), stem))


def _order(row: dict[str, Any]) -> tuple[int, str, int, int]:
    return BLOCKS.index(row["blocks"]), row["dtype"], row["image_tokens"], WAYS.index(row["way"])


if __name__ == "__main__":
    main()
