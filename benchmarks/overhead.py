"""What observing the attention budget costs: time and peak memory of a forward, against stock and the explicit softmax.

    python benchmarks/overhead.py                       # all cases; writes benchmarks/results/overhead-<kind>.{json,md}
    python benchmarks/overhead.py --case scenes-sd3 --rounds 5   # one of them; what the file has of others stays

Four ways to run the same forward: `stock` (nothing attached), `watched` (every attention call is caught and left
alone), `probe` (AttentionMass on every layer, rows to a sink that drops them) and `explicit` (softmax(q k^T)
materialised in float32, masses read off it: what is usually done).
Times are taken in turns within one process, by the wall clock and in processor time, so that a busy machine slows all
alike; ratios are medians of per-round ratios with their 95 % interval (by order statistics), and a target is met or
missed where the interval lies on one side of it. Memory is the peak resident set (CUDA: peak allocation) of a process
of its own for each way, because a peak never comes down again. <kind> is the kind of processor or GPU: how fast it
multiplies decides what the rest costs beside it, so results of one kind say little of another.

Models are built in their dtype: what a cast leaves behind is no one's cost. Target on CPU: probe at most 1.05x stock in
both. The explicit softmax is reported, not a target. What bounds the probe: on a small model, catching calls, which
costs some microseconds for every torch function of an attention module, however small its tensors are (`watched`); on a
large one, the text columns, whose profile is below the table: the product q k^T, begun with the shift by the
log-sum-exp (baddbmm and a copy_; in bfloat16 bmm, add, and a copy_ of q in float32), the exponential (exp_), the sums
over queries (baddbmm_).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parent / "results"
WAYS = ("stock", "watched", "probe", "explicit")
TARGET = 1.05

CASES = {
    "scenes-sd3": "the embedded model, batch of 2 (both guidance branches)",
    "sd3-medium-2-blocks": "two blocks of SD3-medium size, random weights: 24 heads x 64, 4096 + 333 tokens, batch 1",
}
DTYPES = ("float32", "bfloat16")
CLOCKS = {"wall": "times by the wall clock", "cpu": "processor time of all threads, for a machine with other work"}


def build(case: str, dtype: str, device: str) -> tuple[Any, Callable[[], Any]]:
    """What to probe, and the forward to measure."""
    import torch

    torch.manual_seed(0)
    if case == "scenes-sd3":
        from mmdit_probe import load

        model = load("scenes-sd3", device=device, dtype=dtype)
        text = model.encode_prompt(["", "a red ring and a blue house on grass"])
        config = model.transformer.config
        latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
        return model, lambda: model.denoise(latents, 0.5, text)

    import sizes

    return sizes.build("sd3-medium", 4096, dtype, device)


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


def results(name: str, device: str) -> Path:
    """Where the results of a benchmark go on this machine, without the ending."""
    return RESULTS / f"{name}-{machine(device)[1]}"


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
    if way == "stock":
        yield
    elif way == "probe":
        from mmdit_probe import AttentionMass, probe

        with probe(target, AttentionMass(Dropped())):
            yield
    else:
        from mmdit_probe.attention.intercept import watch
        from mmdit_probe.models.families.registry import family_of
        from mmdit_probe.models.layout import find_layers

        transformer = getattr(target, "transformer", target)
        layers = find_layers(family_of(transformer), transformer)
        if way == "explicit":
            detach = [watch(layer.module, explicit_softmax, "output") for layer in layers]
        else:
            detach = [watch(layer.module, Uninterested(), "record") for layer in layers]
        try:
            yield
        finally:
            for undo in detach:
                undo()


def explicit_softmax(call: Any, module_call: Any, proceed: Any) -> Any:
    """Attention with the N x N probabilities in memory; the masses on image and text keys are read off them."""
    import torch

    from mmdit_probe.attention import reference

    attention = reference.probabilities(call.query, call.key, dtype=torch.float32)
    images = module_call.argument("hidden_states", 0).shape[1]
    groups = (torch.arange(call.key.shape[2], device=call.key.device) >= images).long()
    reference.group_masses(attention, groups, 2)
    return (attention @ call.value.float()).to(call.value.dtype)


def timings(case: str, dtype: str, device: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per forward by each clock, `rounds` for each way, in turns; of a small model the mean of a second's
    forwards."""
    target, forward = build(case, dtype, device)
    forward()  # warms up
    count = max(1, round(1 / timed(forward, device)["wall"]))
    seconds: dict[str, dict[str, list[float]]] = {clock: {way: [] for way in WAYS} for clock in CLOCKS}
    for turn in range(rounds):
        for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            with attached(way, target):
                for clock, passed in timed(lambda: [forward() for _ in range(count)], device).items():
                    seconds[clock][way].append(passed / count)
    return seconds


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


def peak_of_this_process(case: str, dtype: str, device: str, way: str) -> dict[str, int]:
    """Peak memory in bytes of two forwards of one way, and what the process held before them."""
    import torch

    from mmdit_probe.results import peak_memory

    target, forward = build(case, dtype, device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory()
    with attached(way, target):
        for _ in range(2):
            forward()
    key = "cuda" if device.startswith("cuda") else "resident"
    return {"before": before[key], "peak": peak_memory()[key]}


def memory(case: str, dtype: str, device: str, way: str) -> dict[str, int]:
    """`peak_of_this_process`, in a new process."""
    arguments = ["--case", case, "--dtype", dtype, "--device", device, "--worker", way]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, dtype: str, device: str, rounds: int, clock: str) -> dict[str, Any]:
    seconds = timings(case, dtype, device, rounds)
    bytes_ = {way: memory(case, dtype, device, way) for way in WAYS}
    row: dict[str, Any] = {"case": case, "dtype": dtype, "device": device, "rounds": rounds}
    for way in WAYS:
        found = {name: ratio(of[way], of["stock"]) for name, of in seconds.items()}
        row[way] = {
            "seconds_median": statistics.median(seconds[clock][way]),
            "time_ratio_median": found[clock][0],
            "time_ratio_interval": found[clock][1],
            "ratios": found,
            "verdict": verdict(found[clock][1], TARGET if way == "probe" else None),
            "peak_bytes": bytes_[way]["peak"],
            "peak_bytes_before_forward": bytes_[way]["before"],
            "peak_ratio": bytes_[way]["peak"] / bytes_["stock"]["peak"],
            "forward_bytes": bytes_[way]["peak"] - bytes_[way]["before"],
        }
    return row


def shares(dtype: str, device: str, tokens: tuple[int, int] = (4096, 333)) -> dict[str, float]:
    """Where the masses' own time goes in one layer of SD3-medium size: share of each torch operator, profiled."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from mmdit_probe.attention import exact
    from mmdit_probe.attention.call import SDPACall

    image, text = tokens
    kind, cuda = getattr(torch, dtype), device.startswith("cuda")
    query, key = (torch.randn(1, image + text, 24, 64, device=device).to(kind).transpose(1, 2) for _ in range(2))
    call = SDPACall(query, key, key)
    lse = exact.attend(call)[1]
    if lse is None:
        return {}
    weights = torch.rand(1, 2, image + text, device=device)
    exact.reduce(call, lse, slice(image, None), query_weights=weights)  # warms up
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(3):
            exact.reduce(call, lse, slice(image, None), query_weights=weights)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = {event.key.removeprefix("aten::"): getattr(event, field) for event in profiler.key_averages()}
    total = sum(spent.values())
    return {
        name: time / total for name, time in sorted(spent.items(), key=lambda item: -item[1]) if time > 0.02 * total
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Overhead of observing the attention budget",
        "",
        "Made by `python benchmarks/overhead.py`.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}; "
        f"{report['date']}.",
        "Ratios are against the stock forward of the same round (median, 95 % interval in brackets); memory is",
        "the peak of a process of its own; 'forward' is what the forward adds to the loaded model and libraries.",
        f"Target on CPU: probe at most {TARGET:.2f} in both ratios.",
        "",
        "| case | dtype | device | way | s / forward | time ratio | by the other clock | target | forward MiB | "
        "peak MiB | peak ratio |",
        "|-|-|-|-|-:|-:|-:|-|-:|-:|-:|",
    ]
    for row in report["rows"]:
        for way in (way for way in WAYS if way in row):
            cell = row[way]
            shown = {name: f"{middle:.3f} [{low:.3f}, {high:.3f}]"
                     for name, (middle, (low, high)) in cell["ratios"].items()}  # fmt: skip
            own = shown.pop(report["clock"])
            cells = (row["case"], row["dtype"], row["device"], way, f"{cell['seconds_median']:.4f}", own)
            cells += (*shown.values(), cell["verdict"])
            mebibytes = f"{cell['peak_bytes'] / 2**20:.0f}"
            forward = f"{cell['forward_bytes'] / 2**20:.0f}"
            lines.append("| " + " | ".join((*cells, forward, mebibytes, f"{cell['peak_ratio']:.3f}")) + " |")
    lines += ["", *(f"* `{case}`: {text}" for case, text in CASES.items())]
    for dtype, parts in report["shares"].items():
        listed = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
        lines += ["", f"What the masses add in {dtype} at SD3-medium size, by torch operator (above 2 %): {listed}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds per case")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, on a busy machine")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    cases, dtypes = options.case or list(CASES), options.dtype or list(DTYPES)
    if options.worker:
        print(json.dumps(peak_of_this_process(cases[0], dtypes[0], options.device, options.worker)))
        return

    import torch

    stem = results("overhead", options.device)
    report: dict[str, Any] = {
        "machine": machine(options.device)[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
    }
    before = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").is_file() else {}
    kept = before if all(before.get(key) == value for key, value in report.items()) else {"rows": [], "shares": {}}
    rows = [row for row in kept["rows"] if row["case"] not in cases or row["dtype"] not in dtypes]
    for case in cases:
        for dtype in dtypes:
            rows.append(measure(case, dtype, options.device, options.rounds, options.clock))
            for way in WAYS[1:]:
                cell = rows[-1][way]
                print(f"{case} {dtype} {way}: {cell['time_ratio_median']:.3f}x time, {cell['peak_ratio']:.3f}x memory")
    report |= {
        "date": time.strftime("%Y-%m-%d"),
        "rows": sorted(rows, key=lambda row: (list(CASES).index(row["case"]), DTYPES.index(row["dtype"]))),
        "shares": kept["shares"] | {dtype: shares(dtype, options.device) for dtype in dtypes},
    }
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        stem.with_suffix(".md").write_text(markdown(report))
        print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
