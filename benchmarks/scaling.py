"""How the cost of observing and editing grows with the image: time and peak memory at 1024, 4096 and 9216 image tokens.

    python benchmarks/scaling.py                                    # writes benchmarks/results/scaling.{json,png}
    python benchmarks/scaling.py --device cuda --dtype bfloat16     # benchmarks/results/scaling-cuda.{json,png}
    python benchmarks/scaling.py --blocks flux --tokens 1024 --rounds 3 --no-write

Blocks of the real sizes with random weights: two of SD3-medium (24 heads x 64, 333 text tokens) and one double and one
single of Flux.1 (24 heads x 128, 512 text tokens), batch 1. Ways, against the stock forward of the same round:

    masses      AttentionMass                     target 1.05
    norms       AttentionMass and ValueNorm       target 1.05
    maps        head-mean maps of all text tokens target 1.10
    words       per-head maps of four positions   no target
    blur        text-axis blur of I2T             target 1.05
    explicit    softmax(q k^T) held in float32    what is usually done; left out where it does not fit

Memory is the peak of a process of its own for each way (CUDA: peak allocation), because a peak never comes down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from overhead import RESULTS, Dropped, timed

WAYS = ("stock", "masses", "norms", "maps", "words", "blur", "explicit")
TARGETS = {"masses": 1.05, "norms": 1.05, "maps": 1.10, "blur": 1.05}
BLOCKS = ("sd3-medium", "flux")
TOKENS = (1024, 4096, 9216)
TEXT = {"sd3-medium": 333, "flux": 512}


def build(blocks: str, tokens: int, dtype: str, device: str, heads: int = 24) -> tuple[Any, Callable[[], Any]]:
    """The transformer and the forward to measure, for a square image of `tokens` tokens."""
    import diffusers
    import torch

    torch.manual_seed(0)
    kind, side = getattr(torch, dtype), math.isqrt(tokens)
    make = {"dtype": kind, "device": device}
    inputs: dict[str, Any]
    if blocks == "sd3-medium":
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=2 * side, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64,
            num_attention_heads=heads, joint_attention_dim=4096, caption_projection_dim=64 * heads,
            pooled_projection_dim=2048, pos_embed_max_size=192,
        )  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(1, 16, 2 * side, 2 * side, **make),
            "encoder_hidden_states": torch.randn(1, TEXT[blocks], 4096, **make),
            "pooled_projections": torch.randn(1, 2048, **make),
            "timestep": torch.full((1,), 500.0, device=device),
        }
    else:
        transformer = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=heads
        )
        ids = torch.zeros(side, side, 3, device=device)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        inputs = {
            "hidden_states": torch.randn(1, side * side, 64, **make),
            "encoder_hidden_states": torch.randn(1, TEXT[blocks], 4096, **make),
            "pooled_projections": torch.randn(1, 768, **make),
            "timestep": torch.full((1,), 0.5, device=device),
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(TEXT[blocks], 3, device=device),
        }
    transformer = transformer.to(device, kind).eval()

    @torch.no_grad()
    def forward() -> Any:
        return transformer(**inputs, return_dict=False)[0]

    return transformer, forward


@contextlib.contextmanager
def attached(way: str, transformer: Any) -> Iterator[None]:
    """The transformer with one way of looking at it, or of changing it, attached."""
    from mmdit_probe import AttentionMass, TextMaps, ValueNorm, probe
    from mmdit_probe.attention.intercept import watch
    from mmdit_probe.edit import Blur
    from mmdit_probe.models.families import family_of
    from mmdit_probe.models.layout import find_layers

    with contextlib.ExitStack() as stack:
        if way == "explicit":
            for layer in find_layers(family_of(transformer), transformer):
                stack.callback(watch(layer.module, explicit_softmax, "output"))
        elif way == "blur":
            stack.enter_context(probe(transformer, edits=Blur("image", "text", layers="all")))
        elif way != "stock":
            observers = {
                "masses": lambda: [AttentionMass(Dropped())],
                "norms": lambda: [AttentionMass(Dropped()), ValueNorm(Dropped())],
                "maps": lambda: [TextMaps()],
                "words": lambda: [TextMaps(words=[3, 4, 5, 6], heads="all")],
            }[way]()
            stack.enter_context(probe(transformer, *observers))
        yield


def explicit_softmax(call: Any, module_call: Any, proceed: Any) -> Any:
    """Attention with the N x N probabilities of all heads in memory."""
    import torch

    from mmdit_probe.attention import reference

    attention = reference.probabilities(call.query, call.key, dtype=torch.float32)
    return (attention @ call.value.float()).to(call.value.dtype)


def fits(way: str, blocks: str, tokens: int, device: str, heads: int = 24) -> bool:
    """Whether the explicit softmax (three float32 N x N matrices for every head) fits into the memory there is."""
    import torch

    if way != "explicit":
        return True
    needed = 3 * 4 * heads * (tokens + TEXT[blocks]) ** 2
    if device.startswith("cuda"):
        return needed < torch.cuda.mem_get_info(device)[0]
    return needed < 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def timings(blocks: str, tokens: int, dtype: str, device: str, rounds: int, heads: int = 24) -> dict[str, list[float]]:
    """Seconds per forward, `rounds` for each way that fits, in turns; a first round warms up."""
    transformer, forward = build(blocks, tokens, dtype, device, heads)
    ways = [way for way in WAYS if fits(way, blocks, tokens, device, heads)]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            with attached(way, transformer):
                seconds[way].append(timed(forward, device))
    return {way: values[1:] for way, values in seconds.items()}


def peak_of_this_process(blocks: str, tokens: int, dtype: str, device: str, way: str) -> int:
    """Peak memory in bytes of two forwards of one way."""
    from mmdit_probe.results import peak_memory

    transformer, forward = build(blocks, tokens, dtype, device)
    with attached(way, transformer):
        for _ in range(2):
            forward()
    return int(peak_memory()["cuda" if device.startswith("cuda") else "resident"])


def memory(blocks: str, tokens: int, dtype: str, device: str, way: str) -> int:
    """`peak_of_this_process`, in a new process."""
    arguments = ["--blocks", blocks, "--tokens", str(tokens), "--dtype", dtype, "--device", device, "--worker", way]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(blocks: str, tokens: int, dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row for every way: median seconds, time and peak memory against stock."""
    seconds = timings(blocks, tokens, dtype, device, rounds)
    peaks = {way: memory(blocks, tokens, dtype, device, way) for way in seconds}
    rows = []
    for way, values in seconds.items():
        ratios = [mine / stock for mine, stock in zip(values, seconds["stock"], strict=True)]
        rows.append(
            {
                "blocks": blocks, "image_tokens": tokens, "text_tokens": TEXT[blocks], "dtype": dtype, "way": way,
                "seconds": statistics.median(values), "time_ratio": statistics.median(ratios),
                "time_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None,
                "peak_bytes": peaks[way], "peak_ratio": peaks[way] / peaks["stock"], "target": TARGETS.get(way),
            }
        )  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]]) -> Any:
    """Time and memory against the number of image tokens, one panel for each kind of block."""
    from mmdit_probe.plots import style

    names = sorted({row["blocks"] for row in rows}, key=BLOCKS.index)
    figure = style.figure(3.3 * len(names), 4.6)
    axes = figure.subplots(2, len(names), squeeze=False, sharex=True)
    for column, blocks in enumerate(names):
        for line, (key, label, unit) in enumerate(
            (("seconds", "seconds per forward", 1.0), ("peak_bytes", "peak memory, GiB", 2.0**30))
        ):
            axis = axes[line, column]
            for way in WAYS:
                part = sorted((row["image_tokens"], row[key] / unit) for row in rows
                              if row["blocks"] == blocks and row["way"] == way)  # fmt: skip
                if part:
                    axis.plot(*zip(*part, strict=True), marker="o", markersize=3, linewidth=1, label=way)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.set_title(blocks if line == 0 else "")
            axis.set_xlabel("image tokens" if line == 1 else "")
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", choices=BLOCKS, action="append", help="default: both")
    parser.add_argument("--tokens", type=int, action="append", help="image tokens, a square number; default: all three")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    blocks, tokens = options.blocks or list(BLOCKS), options.tokens or list(TOKENS)
    if options.worker:
        print(json.dumps(peak_of_this_process(blocks[0], tokens[0], options.dtype, options.device, options.worker)))
        return

    import torch

    rows = []
    for name in blocks:
        for count in tokens:
            rows += measure(name, count, options.dtype, options.device, options.rounds)
            for row in rows[-len(WAYS) :]:
                if row["blocks"] == name and row["image_tokens"] == count:
                    ratios = f"{row['time_ratio']:.3f}x time, {row['peak_ratio']:.3f}x memory"
                    print(f"{name} {count} {row['way']}: {ratios}", flush=True)
    if options.no_write:
        return
    cuda = options.device.startswith("cuda")
    machine = torch.cuda.get_device_name(options.device) if cuda else platform.machine()
    report = {"machine": f"{machine}, {os.cpu_count()} cores", "torch": torch.__version__,
              "threads": torch.get_num_threads(), "rows": rows}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / ("scaling" if options.device == "cpu" else f"scaling-{options.device.split(':')[0]}")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    plot(rows).savefig(stem.with_suffix(".png"), dpi=200)
    print(f"written: {stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
