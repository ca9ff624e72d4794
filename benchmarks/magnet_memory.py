"""What maps with gradients cost a training step: peak memory and time at SD3-medium size, against the explicit softmax.

    python benchmarks/magnet_memory.py                  # a minute or two on one core; writes results/magnet_memory.*
    python benchmarks/magnet_memory.py --side 32 --no-write
    python benchmarks/magnet_memory.py --device cuda --dtype bfloat16

One step of one block of SD3-medium size (24 heads x 64; `side` x `side` image and 333 text tokens; batch 1, random
weights) with a LoRA of rank 16: forward, a loss, backward. Ways: `flow` has no maps; the others add its I2T
maps, `token` those of 8 words averaged over heads, `head` every head and text token, before (`logit`) or after
(`probability`) the softmax; `dense` reads the same head maps off an explicit softmax(q k^T). Each way runs in a process
of its own, because a peak never comes down again. Extra is over `flow`; beside it stands what one set of maps holds,
H I T (or I G) numbers, against the N x N of one explicit softmax.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from overhead import RESULTS, machine

WAYS = ("flow", "token-logit", "token-probability", "head-logit", "head-probability", "dense")
HEADS, WIDTH, TEXT, WORDS = 24, 64, 333, 8


@contextmanager
def maps_of(way: str, transformer: Any, side: int) -> Iterator[Callable[[], list[Any]]]:
    """A function that gives the maps of the block, with gradients, after a forward of the transformer."""
    import torch

    from mmdit_probe import probe
    from mmdit_probe.attention.intercept import watch
    from mmdit_probe.magnet.tap import TextMapTap

    image = side * side
    if way == "flow":
        yield list
    elif way == "dense":
        found: list[Any] = []

        def explicit(call: Any, module_call: Any, proceed: Any) -> Any:
            attention = (call.scale_factor * call.query.float() @ call.key.float().transpose(-1, -2)).softmax(-1)
            found.append(attention[:, :, :image, image:].transpose(-1, -2).unflatten(-1, (side, side)))
            return (attention @ call.value.float()).to(call.value.dtype)

        detach = watch(transformer.transformer_blocks[0].attn, explicit, "output")
        yield lambda: found
        detach()
    else:
        level, _, space = way.partition("-")
        groups = torch.zeros(1, TEXT, WORDS, device=next(transformer.parameters()).device)
        groups[:, range(WORDS), range(WORDS)] = 1.0
        tap = TextMapTap([0], space=space, reduce=level == "token")
        with probe(transformer, edits=tap):
            tap.begin(groups if level == "token" else None)
            yield lambda: list(tap.take().values())


def build(side: int, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """One block with a LoRA, and the inputs of one step."""
    import torch
    from diffusers import SD3Transformer2DModel

    from mmdit_probe.magnet.lora import attach, target_modules
    from mmdit_probe.models.families.registry import family_of

    torch.manual_seed(0)
    kind, width = getattr(torch, dtype), HEADS * WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=2 * side, patch_size=2, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=WIDTH,
        num_attention_heads=HEADS, joint_attention_dim=4096, caption_projection_dim=width, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    ).to(device, kind)  # fmt: skip
    attach(transformer, target_modules(family_of(transformer), transformer), rank=16, alpha=16)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2 * side, 2 * side, dtype=kind, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096, dtype=kind, device=device),
        "pooled_projections": torch.randn(1, 2048, dtype=kind, device=device),
        "timestep": torch.full((1,), 500.0, device=device),
    }
    return transformer, inputs


def step(way: str, transformer: Any, inputs: dict[str, Any], side: int) -> float:
    """Forward, loss, backward; the loss."""
    with maps_of(way, transformer, side) as maps:
        loss = transformer(**inputs, return_dict=False)[0].float().square().mean()
        for of in maps():
            loss = loss + of.square().mean()
        loss.backward()
    return float(loss.detach())


def worker(way: str, side: int, dtype: str, device: str) -> dict[str, float]:
    """Peak bytes of one step of one way in this process, what it held before, and seconds."""
    import torch

    from mmdit_probe.results import peak_memory

    transformer, inputs = build(side, dtype, device)
    key = "cuda" if device.startswith("cuda") else "resident"
    if key == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory()[key]
    step(way, transformer, inputs, side)
    peak = peak_memory()[key]  # of CUDA: waits for nothing, allocations are made in order
    if key == "cuda":
        torch.cuda.synchronize()
    transformer.zero_grad(set_to_none=True)
    began = time.perf_counter()  # the second step: the first one warms up
    step(way, transformer, inputs, side)
    if key == "cuda":
        torch.cuda.synchronize()
    return {"before": before, "peak": peak, "seconds": time.perf_counter() - began}


def apart(way: str, side: int, dtype: str, device: str) -> dict[str, float]:
    """`worker`, in a new process."""
    line = [sys.executable, __file__, "--worker", way, "--side", str(side), "--dtype", dtype, "--device", device]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def held(way: str, side: int) -> int:
    """Bytes of one copy, in float32, of what a way holds: its maps, or the explicit softmax."""
    image = side * side
    numbers = {"flow": 0, "dense": HEADS * (image + TEXT) ** 2, "token-logit": HEADS * image * WORDS}
    numbers["token-probability"] = HEADS * image * WIDTH  # groups are padded to the width of a head
    return 4 * numbers.get(way, HEADS * image * TEXT)


def markdown(report: dict[str, Any]) -> str:
    image = report["side"] ** 2
    lines = [
        "# Memory of maps with gradients",
        "",
        "Made by `python benchmarks/magnet_memory.py`.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads, {report['dtype']}.",
        f"A training step of one block of SD3-medium size: {HEADS} heads x {WIDTH}, I = {image} image and T = {TEXT}",
        f"text tokens (N = {image + TEXT}), batch 1. `extra` is the peak over that of `flow`, the step without maps;",
        "`one copy` is what one set of maps holds, O(I T) per head (`dense`: N x N); forward and backward keep a few.",
        "",
        "| way | seconds | step MiB | extra MiB | one copy MiB |",
        "|-|-:|-:|-:|-:|",
    ]
    base = report["rows"][0]
    for row in report["rows"]:
        step_, extra = row["peak"] - row["before"], row["peak"] - base["peak"]
        cells = [f"{value / 2**20:.0f}" for value in (step_, extra, held(row["way"], report["side"]))]
        lines.append(f"| {row['way']} | {row['seconds']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64, help="image tokens along a side")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    ask = parser.parse_args()
    if ask.worker:
        print(json.dumps(worker(ask.worker, ask.side, ask.dtype, ask.device)))
        return

    import torch

    rows = []
    for way in WAYS:
        rows.append({"way": way, **apart(way, ask.side, ask.dtype, ask.device)})
        print(f"{way}: peak {rows[-1]['peak'] / 2**20:.0f} MiB, {rows[-1]['seconds']:.1f} s", flush=True)
    report = {"machine": machine(ask.device)[0], "torch": torch.__version__, "side": ask.side,
              "threads": torch.get_num_threads(), "dtype": ask.dtype, "rows": rows}  # fmt: skip
    if not ask.no_write:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / ("magnet_memory" if ask.device == "cpu" else f"magnet_memory-{ask.device.split(':')[0]}")
        stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        stem.with_suffix(".md").write_text(markdown(report))
        print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
