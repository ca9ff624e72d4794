"""What observing the attention budget costs on the embedded model: time and peak memory, against stock and the softmax.

    python benchmarks/overhead.py                       # writes benchmarks/results/overhead-<kind>.{json,md}
    python benchmarks/overhead.py --dtype float32 --rounds 15

Five ways to run the same forward: `stock` (nothing attached), `again` (stock once more: its ratio is the noise),
`watched` (every attention call is caught and left alone), `probe` (AttentionMass on every layer, rows to a sink that
drops them) and `explicit` (softmax(q k^T) materialised in float32, masses read off it: what is usually done).
Times are taken in turns within one process, by the wall clock and in processor time, so that a busy machine slows all
alike; ratios are medians of per-round ratios with their 95 % interval (by order statistics), and a target is met or
missed where the interval of the deciding clock lies on one side of it. Memory is the peak while a way runs: of the
resident set, which Linux can reset (elsewhere it is left out), on CUDA of what is allocated. <kind> is the kind of
processor or GPU: how fast it multiplies decides what the rest costs beside it, so results of one kind say little of
another.

Target on CPU: probe at most 1.05x stock in both. What bounds it on so small a model is catching calls, some
microseconds for every torch function of an attention module, however small its tensors are (`watched`). Blocks of the
real sizes are measured by `scaling.py`, other tools on them by `peers.py`; both use what stands here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmdit_probe.errors import at_least, run_script
from mmdit_probe.models.names import device_name

sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parent / "results"
WAYS = ("stock", "again", "watched", "probe", "explicit")
TARGET = 1.05
DTYPES = ("float32", "bfloat16")
CLOCKS = {"wall": "times by the wall clock", "cpu": "processor time of all threads, for a machine with other work"}

Seconds = dict[str, dict[str, list[float]]]
"""Of each clock and way, one for each round."""
Attach = Callable[[str], AbstractContextManager[Any]]
"""Gives what to enter for a way; what that yields is run in place of the forward, unless it is None."""


def build(dtype: str, device: str) -> tuple[Any, Callable[[], Any]]:
    """The embedded model, and a denoising call of both guidance branches."""
    import torch

    from mmdit_probe import load

    torch.manual_seed(0)
    model = load("scenes-sd3", device=device, dtype=dtype)
    text = model.encode_prompt(["", "a red ring and a blue house on grass"])
    config = model.transformer.config
    latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    return model, lambda: model.denoise(latents, 0.5, text)


def machine(device: str) -> tuple[str, str]:
    """The machine in words, and its kind as it stands in file names: a GPU's name, or a processor's vector units."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        return name, "-".join(name.lower().split())
    known = torch.cpu.get_capabilities()
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if known.get(unit)]
    kind = units[0].split("_f")[0].replace("_", "-") if units else platform.machine()
    return f"{known.get('cpu_name', platform.machine())} with {kind}, {os.cpu_count()} cores", kind


def described(device: str, clock: str) -> dict[str, Any]:
    """What a result file says of how it was measured; rows of another machine or library are no company for these."""
    import torch

    return {"machine": machine(device)[0], "torch": torch.__version__, "threads": torch.get_num_threads(),
            "clock": clock}  # fmt: skip


def results(name: str, device: str) -> Path:
    """Where the results of a benchmark go on this machine, without the ending."""
    return RESULTS / f"{name}-{machine(device)[1]}"


def kept(stem: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier, stopped run if it was measured in the same way, else an empty one."""
    file = stem.with_suffix(".json")
    before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    same = all(before.get(key) == value for key, value in report.items())
    return before if same and before else report | {"rows": []}


def write(stem: Path, report: dict[str, Any], text: str) -> None:
    """The report and its page, each whole or as it was before."""
    stem.parent.mkdir(exist_ok=True)
    for ending, content in ((".json", json.dumps(report, indent=2) + "\n"), (".md", text)):
        part = stem.with_suffix(f"{ending}.tmp")
        part.write_text(content, encoding="utf-8")
        os.replace(part, stem.with_suffix(ending))


class Dropped:
    """A sink that keeps nothing, so that the observer's own cost is measured."""

    def write(self, columns: Any) -> None:
        del columns


class Uninterested:
    """A recorder for which the calls are caught, but which wants nothing of them."""

    def wants(self, module_call: Any) -> str:
        return "nothing"

    def record(self, record: Any) -> None:
        del record


@contextlib.contextmanager
def attached(way: str, target: Any) -> Iterator[None]:
    """The target with one of the ways attached."""
    with contextlib.ExitStack() as stack:
        if way == "probe":
            from mmdit_probe import AttentionMass, probe

            stack.enter_context(probe(target, AttentionMass(Dropped())))
        elif way == "explicit":
            stack.enter_context(caught(target, explicit_softmax, "output"))
        elif way == "watched":
            stack.enter_context(caught(target, Uninterested(), "record"))
        yield


@contextlib.contextmanager
def caught(target: Any, handler: Any, kind: str) -> Iterator[None]:
    """The attention calls of all layers handed to `handler`."""
    from mmdit_probe.attention.intercept import watch
    from mmdit_probe.models.families.registry import family_of
    from mmdit_probe.models.layout import find_layers

    transformer = getattr(target, "transformer", target)
    with contextlib.ExitStack() as stack:
        for layer in find_layers(family_of(transformer), transformer):
            stack.callback(watch(layer.module, handler, kind))
        yield


def explicit_softmax(call: Any, module_call: Any, proceed: Any) -> Any:
    """Attention with the N x N probabilities in memory; the masses on image and text keys are read off them."""
    import torch

    from mmdit_probe.attention import reference

    attention = reference.probabilities(call.query, call.key, dtype=torch.float32)
    images = module_call.argument("hidden_states", 0).shape[1]
    groups = (torch.arange(call.key.shape[2], device=call.key.device) >= images).long()
    reference.group_masses(attention, groups, 2)
    return (attention @ call.value.float()).to(call.value.dtype)


def in_turns(
    ways: Sequence[str],
    attach: Attach,
    forward: Callable[[], Any],
    device: str,
    rounds: int,
    least: float = 0.0,
) -> Seconds:
    """Seconds per forward of every way, the ways in turns.

    Args:
        least: seconds that one reading takes at least; of a small model it is the mean of many forwards.
    """
    count = max(1, round(least / timed(forward, device)["wall"])) if least else 1
    seconds: Seconds = {clock: {way: [] for way in ways} for clock in CLOCKS}
    for turn in range(rounds):
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            with attach(way) as given:
                run = given or forward
                for clock, passed in timed(lambda run=run: [run() for _ in range(count)], device).items():
                    seconds[clock][way].append(passed / count)
    return seconds


def peaks_of(
    ways: Sequence[str], attach: Attach, forward: Callable[[], Any], device: str
) -> dict[str, tuple[int, int] | None]:
    """`peak` of every way, each after one of its own that warms up: what a first one loads and keeps is no cost."""
    found = {}
    for way in ways:
        with attach(way) as given:
            run = given or forward
            run()
            found[way] = peak(run, device)
    return found


def timed(forward: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of one forward by each clock; on CUDA, those between device events stand for the wall clock's."""
    import torch

    if device.startswith("cuda"):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.process_time()
        start.record()
        forward()
        stop.record()
        spent = time.process_time() - begin
        torch.cuda.synchronize()
        return {"wall": start.elapsed_time(stop) / 1000, "cpu": spent}
    wall, begin = time.perf_counter(), time.process_time()
    forward()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - begin}


def ratio(mine: list[float], stock: list[float]) -> tuple[float, list[float]]:
    """Median of the per-round ratios, and its 95 % interval by order statistics; NaN below six rounds."""
    from scipy.stats import quantile_test

    of_round = [one / base for one, base in zip(mine, stock, strict=True)]
    found = quantile_test(of_round).confidence_interval(0.95)
    return statistics.median(of_round), [float(found.low), float(found.high)]


def verdict(interval: list[float], target: float | None) -> str:
    """Whether a ratio keeps a target, as far as its interval tells."""
    low, high = interval
    if target is None:
        return ""
    if not low <= high:
        return "too few rounds"
    return "met" if high <= target else "missed" if low > target else "undecided"


def peak(forward: Callable[[], Any], device: str) -> tuple[int, int] | None:
    """Bytes held before `forward`, and the most while it runs; None where the system cannot tell."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        forward()
        torch.cuda.synchronize(device)
        return before, int(torch.cuda.max_memory_allocated(device))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier forwards freed is not this one's
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
    except (OSError, AttributeError):
        return None
    before = _resident_peak()
    forward()
    return before, _resident_peak()


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def compared(seconds: Seconds, peaks: dict[str, tuple[int, int] | None], clock: str, base: str) -> list[dict[str, Any]]:
    """Per way: median seconds, its ratio to `base` with its interval by both clocks, memory and its ratio.

    Args:
        peaks: as `peak` gives them. clock: of the seconds.
    """
    rows, stock = [], peaks[base]
    for way in seconds[clock]:
        found, mine = peaks[way], {name: ratio(of[way], of[base]) for name, of in seconds.items()}
        rows.append({
            "way": way, "seconds": statistics.median(seconds[clock][way]), "ratios": mine,
            "peak_bytes": found and found[1], "added_bytes": found and found[1] - found[0],
            # Against the same base, whatever the process has come to hold between the two.
            "peak_ratio": 1 + (found[1] - found[0] - stock[1] + stock[0]) / stock[1] if found and stock else None,
        })  # fmt: skip
    return rows


def shown(ratios: dict[str, Any], clock: str) -> tuple[str, str]:
    """The ratio by the deciding clock and by the other one, as "median [low, high]"."""
    told = {name: f"{middle:.3f} [{low:.3f}, {high:.3f}]" for name, (middle, (low, high)) in ratios.items()}
    return told.pop(clock), *told.values()


def mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.0f}"


def measure(dtype: str, device: str, rounds: int, clock: str) -> list[dict[str, Any]]:
    """One row for each way, on the embedded model."""
    target, forward = build(dtype, device)

    def attach(way: str) -> AbstractContextManager[None]:
        return attached(way, target)

    peaks = peaks_of(WAYS, attach, forward, device)
    seconds = in_turns(WAYS, attach, forward, device, rounds, least=1.0)
    rows = compared(seconds, peaks, clock, "stock")
    for row in rows:
        row |= {"dtype": dtype, "rounds": rounds}
        row["verdict"] = verdict(row["ratios"][clock][1], TARGET if row["way"] == "probe" else None)
    return rows


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Overhead of observing the attention budget",
        "",
        "Made by `python benchmarks/overhead.py`: the embedded model, a batch of both guidance branches.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}.",
        "Ratios are against the stock forward of the same round: median, and 95 % interval over rounds, which decides.",
        "`again` is stock once more, so its interval is the noise. 'added' is the peak over what was held before.",
        f"Target on CPU: probe at most {TARGET:.2f} in time and in peak memory.",
        "",
        "| dtype | way | rounds | s / forward | time ratio | by the other clock | target | added MiB | peak MiB | "
        "peak ratio |",
        "|-|-|-:|-:|-:|-:|-|-:|-:|-:|",
    ]
    for row in report["rows"]:
        memory = "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}"
        cells = (row["dtype"], row["way"], str(row["rounds"]), f"{row['seconds']:.4f}")
        cells += (*shown(row["ratios"], report["clock"]), row["verdict"])
        cells += (mebibytes(row["added_bytes"]), mebibytes(row["peak_bytes"]), memory)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def common_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options that all benchmarks of ratios have."""
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help="of each cell; no verdict below six")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, on a busy machine")
    parser.add_argument("--fresh", action="store_true", help="measure what the result file has, too")
    parser.add_argument("--no-write", action="store_true", help="print only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    common_options(parser, rounds=9)
    options = parser.parse_args()
    stem = results("overhead", options.device)
    report = kept(stem, described(options.device, options.clock))
    for dtype in options.dtype or DTYPES:
        if not options.fresh and any(row["dtype"] == dtype for row in report["rows"]):
            print(f"{dtype}: in {stem.name}.json already; --fresh measures it again")
            continue
        report["rows"] = [row for row in report["rows"] if row["dtype"] != dtype]
        report["rows"] += measure(dtype, options.device, options.rounds, options.clock)
        for row in report["rows"][-len(WAYS) :]:
            print(f"{dtype} {row['way']}: {shown(row['ratios'], options.clock)[0]} x time {row['verdict']}", flush=True)
        if not options.no_write:
            write(stem, report, markdown(report))
            print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    run_script(main)
