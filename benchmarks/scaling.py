"""How the cost of observing and editing grows with the image: time and peak memory at 1024, 4096 and 9216 image tokens.

    python benchmarks/scaling.py                              # benchmarks/results/scaling-<kind>.{json,md,png,pdf}
    python benchmarks/scaling.py --device cuda                # <kind>: of the processor or GPU
    python benchmarks/scaling.py --blocks flux --tokens 1024 --rounds 3 --dtype float32 --no-write

Blocks of the real sizes with random weights: two of SD3-medium (24 heads x 64, 333 text tokens) and one double and one
single of Flux.1 (24 heads x 128, 512 text tokens), batch 1, bfloat16 unless told otherwise. Ways, against the stock
forward of the same round:

    again       stock once more: the noise
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
built in their dtype. Peak memory is that of an untimed forward of each way, as `overhead.py` finds it. A cell (blocks,
tokens, dtype) that the result file has is not measured again, so a stopped run goes on; `--fresh` measures anew.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import overhead
from overhead import CLOCKS, Dropped, in_turns, shown, verdict
from sizes import SIZES, TEXT, build

from mmdit_probe.errors import at_least, run_script

WAYS = ("stock", "again", "masses", "norms", "maps", "words", "blur", "explicit")
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
    from mmdit_probe.edit import Blur

    with contextlib.ExitStack() as stack:
        if way == "explicit":
            stack.enter_context(overhead.caught(transformer, explicit_softmax, "output"))
        elif way == "blur":
            stack.enter_context(probe(transformer, edits=Blur("image", "text", layers="all")))
        elif way not in ("stock", "again"):
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


def measure(
    blocks: str, tokens: int, dtype: str, device: str, rounds: int, clock: str, heads: int | None = None
) -> list[dict[str, Any]]:
    """One row for every way that fits: median seconds, time and peak memory against stock."""
    ways = [way for way in WAYS if fits(way, blocks, tokens, device, heads)]
    cell = {"blocks": blocks, "image_tokens": tokens, "text_tokens": TEXT[blocks], "dtype": dtype, "rounds": rounds}
    built = build(blocks, tokens, dtype, device, heads)
    return [cell | row for row in measured(*built, ways, device, rounds, clock)]


def measured(
    transformer: Any, forward: Callable[[], Any], ways: Sequence[str], device: str, rounds: int, clock: str
) -> list[dict[str, Any]]:
    """One row for every way, on a transformer."""
    own: dict[str, list[float]] = {way: [] for way in OBSERVING if way in ways and not device.startswith("cuda")}

    @contextlib.contextmanager
    def watched(way: str) -> Iterator[None]:
        spent = Spent(clock)
        with attached(way, transformer, spent):
            yield
        if way in own:
            own[way].append(spent.seconds)

    peaks = overhead.peaks_of(ways, lambda way: attached(way, transformer), forward, device)
    # A forward of a GPU is over in a millisecond; that of a processor takes seconds, and is watched alone.
    seconds = in_turns(ways, watched, forward, device, rounds, least=0.1 if device.startswith("cuda") else 0.0)
    return judged(seconds, peaks, own, clock)


def judged(
    seconds: overhead.Seconds,
    peaks: dict[str, tuple[int, int] | None],
    own: dict[str, list[float]],
    clock: str,
) -> list[dict[str, Any]]:
    """`overhead.compared`, with what each way adds to stock, and whether it keeps its target.

    Args:
        own: seconds of each forward that the observers took, where that is known.
    """
    rows = overhead.compared(seconds, peaks, clock, "stock")
    for row in rows:
        way, target = row["way"], TARGETS.get(row["way"])
        values, stock, memory = seconds[clock][way], seconds[clock]["stock"], row["peak_ratio"]
        added, within = [mine - base for mine, base in zip(values, stock, strict=True)], None
        if way in own:
            within = statistics.median(whole / (whole - part) for whole, part in zip(values, own[way], strict=True))
            added = own[way]
        row |= {
            "added_seconds": statistics.median(added), "within": within, "target": target,
            "verdict": verdict(row["ratios"][clock][1], target),
            "memory_met": None if target is None or memory is None else memory <= target,
        }  # fmt: skip
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
    asked = sum(row["target"] is not None for row in rows)
    lines = [
        "# Cost of observing and editing at real block sizes",
        "",
        "Made by `python benchmarks/scaling.py`, which says what the ways are.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}.",
        "Ratios are against the stock forward of the same round, median and 95 % interval over rounds, which decides;",
        "'other clock': the same in processor time (or by the wall clock). `again` is stock once more: the noise.",
        "'within' is the same forward with and without the observers' own time, 'added s' that time.",
        "",
        f"Targets: {met} of {asked} cells met in time and memory, {len(missed)} missed, {asked - met - len(missed)} "
        "undecided."
        + ("" if not missed else " Missed: " + ", ".join(_cell(row, report["clock"]) for row in missed) + "."),
        "",
        "| blocks | dtype | image tokens | way | rounds | s / forward | added s | time ratio | other clock | within | "
        "added MiB | peak ratio | target | |",
        "|-|-|-:|-|-:|-:|-:|-:|-:|-:|-:|-:|-:|-|",
    ]
    for row in rows:
        memory = "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}"
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        told = "missed" if row in missed else row["verdict"]
        cells = (
            row["blocks"], row["dtype"], str(row["image_tokens"]), row["way"], str(row["rounds"]),
            f"{row['seconds']:.3f}", f"{row['added_seconds']:.4f}", *shown(row["ratios"], report["clock"]),
            "-" if row["within"] is None else f"{row['within']:.3f}", overhead.mebibytes(row["added_bytes"]), memory,
            target, told,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Growth: exponent p of seconds ~ (image tokens) ** p, smallest to largest image.", ""]
    lines += ["| blocks | dtype | way | whole forward | what the way adds |", "|-|-|-|-:|-:|"]
    for blocks, dtype in dict.fromkeys((row["blocks"], row["dtype"]) for row in rows):
        for way in WAYS:
            whole, added = (growth(rows, blocks, dtype, way, key) for key in ("seconds", "added_seconds"))
            if whole is not None:
                beside = "-" if added is None or way == "stock" else f"{added:.2f}"
                lines.append(f"| {blocks} | {dtype} | {way} | {whole:.2f} | {beside} |")
    cells = dict.fromkeys((row["blocks"], row["dtype"], row["image_tokens"]) for row in rows)
    whole_cells = {(row["blocks"], row["dtype"], row["image_tokens"]) for row in rows if row["way"] == "explicit"}
    for blocks, dtype, tokens in cells.keys() - whole_cells:
        lines += ["", f"* explicit softmax left out at {blocks}, {dtype}, {tokens} image tokens: it does not fit"]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], clock: str) -> str:
    memory = "" if row["memory_met"] is not False else f", {row['peak_ratio']:.3f}x memory"
    time_ratio = f"{row['ratios'][clock][0]:.3f}x time"
    return f"{row['blocks']} {row['dtype']} {row['image_tokens']} {row['way']} ({time_ratio}{memory})"


def square(text: str) -> int:
    """What `--tokens` is read by: the tokens of a square image."""
    number = at_least(1)(text)
    if math.isqrt(number) ** 2 != number:
        raise argparse.ArgumentTypeError(f"{number} tokens are no square image; expected 1024, 4096, ...")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", choices=BLOCKS, action="append", help="default: both")
    parser.add_argument("--tokens", type=square, action="append", help="image tokens, a square; default: all three")
    parser.add_argument("--dtype", choices=overhead.DTYPES, default="bfloat16")
    overhead.common_options(parser, rounds=9)
    options = parser.parse_args()
    stem = overhead.results("scaling", options.device)
    report = overhead.kept(stem, overhead.described(options.device, options.clock))
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
                told = f"{shown(row['ratios'], options.clock)[0]} x time{within}{memory} {row['verdict']}"
                print(f"{blocks} {tokens} {row['way']}: {told}", flush=True)
            if not options.no_write:
                overhead.write(stem, report, markdown(report))
                print(f"written: {stem}.json, {stem}.md")


def _order(row: dict[str, Any]) -> tuple[int, str, int, int]:
    return BLOCKS.index(row["blocks"]), row["dtype"], row["image_tokens"], WAYS.index(row["way"])


if __name__ == "__main__":
    run_script(main)
