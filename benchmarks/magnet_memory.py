"""What maps with gradients cost a training step: peak memory and time at SD3-medium size, against the explicit softmax.

    python benchmarks/magnet_memory.py                  # benchmarks/results/magnet_memory-<kind>.{json,md}
    python benchmarks/magnet_memory.py --side 64 --rounds 1     # minutes for each round
    python benchmarks/magnet_memory.py --device cuda --dtype bfloat16 --side 64

One step of one block of SD3-medium size (24 heads x 64; `side` x `side` image and 333 text tokens; batch 1, random
weights) with a LoRA of rank 16: forward, a loss, backward. Ways: `flow` has no maps; the others add its I2T
maps, `token` those of 8 words averaged over heads, `head` every head and text token, before (`logit`) or after
(`probability`) the softmax; `dense` reads the same head maps off an explicit softmax(q k^T). Time is taken in turns and
memory is the peak of a step, as in `overhead.py`; `again` is `flow` once more, so its interval is the noise. Extra is
over `flow`; beside it stands what one set of maps holds, H I T (or I G) numbers, against the N x N of one explicit
softmax. A side that the result file has is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import overhead
from overhead import CLOCKS, in_turns, mebibytes, shown

from mmdit_probe.errors import at_least, run_script

WAYS = ("flow", "again", "token-logit", "token-probability", "head-logit", "head-probability", "dense")
HEADS, WIDTH, TEXT, WORDS = 24, 64, 333, 8


@contextmanager
def maps_of(way: str, transformer: Any, side: int) -> Iterator[Callable[[], list[Any]]]:
    """A function that gives the maps of the block, with gradients, after a forward of the transformer."""
    import torch

    from mmdit_probe import probe
    from mmdit_probe.attention.intercept import watch
    from mmdit_probe.magnet.tap import TextMapTap

    image = side * side
    if way in ("flow", "again"):
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


def build(side: int, dtype: str, device: str, heads: int = HEADS) -> tuple[Any, dict[str, Any]]:
    """One block with a LoRA, and the inputs of one step."""
    import torch
    from diffusers import SD3Transformer2DModel

    from mmdit_probe.magnet.lora import attach, target_modules
    from mmdit_probe.models.families.registry import family_of

    torch.manual_seed(0)
    kind, width = getattr(torch, dtype), heads * WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=2 * side, patch_size=2, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=WIDTH,
        num_attention_heads=heads, joint_attention_dim=4096, caption_projection_dim=width, pooled_projection_dim=2048,
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


def measure(side: int, dtype: str, device: str, rounds: int, clock: str, heads: int = HEADS) -> list[dict[str, Any]]:
    """One row for each way."""
    transformer, inputs = build(side, dtype, device, heads)

    @contextmanager
    def stepping(way: str) -> Iterator[Callable[[], float]]:
        transformer.zero_grad(set_to_none=True)
        yield lambda: step(way, transformer, inputs, side)

    peaks = overhead.peaks_of(WAYS, stepping, lambda: None, device)
    seconds = in_turns(WAYS, stepping, lambda: None, device, rounds)
    rows = overhead.compared(seconds, peaks, clock, "flow")
    return [{"side": side, "heads": heads, "dtype": dtype, "rounds": rounds} | row for row in rows]


def held(way: str, side: int) -> int:
    """Bytes of one copy, in float32, of what a way holds: its maps, or the explicit softmax."""
    image = side * side
    numbers = {"flow": 0, "again": 0, "dense": HEADS * (image + TEXT) ** 2, "token-logit": HEADS * image * WORDS}
    numbers["token-probability"] = HEADS * image * WIDTH  # groups are padded to the width of a head
    return 4 * numbers.get(way, HEADS * image * TEXT)


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Memory of maps with gradients",
        "",
        "Made by `python benchmarks/magnet_memory.py`.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}.",
        f"A training step of one block of SD3-medium size: {HEADS} heads x {WIDTH}, I image and T = {TEXT} text",
        "tokens, batch 1. Ratios are against `flow`, the step without maps, of the same round: median, 95 % interval",
        "(nan: too few rounds); `again` is `flow` once more: the noise. `step` is the peak over what was held before,",
        "`extra` that over the peak of `flow`; `one copy` is what one set of maps holds in float32, O(I T) per head",
        "(`dense`: N x N); forward and backward keep a few.",
        "",
        "| dtype | I | way | rounds | seconds | time ratio | other clock | step MiB | extra MiB | one copy MiB |",
        "|-|-:|-|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for row in report["rows"]:
        flow = next(one for one in report["rows"] if one["way"] == "flow" and _cell(one) == _cell(row))
        extra = None if flow["peak_bytes"] is None else row["peak_bytes"] - flow["peak_bytes"]
        cells = (row["dtype"], str(row["side"] ** 2), row["way"], str(row["rounds"]), f"{row['seconds']:.2f}")
        cells += shown(row["ratios"], report["clock"])
        cells += tuple(mebibytes(value) for value in (row["added_bytes"], extra, held(row["way"], row["side"])))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> tuple[int, str]:
    return row["side"], row["dtype"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=at_least(1), default=32, help="image tokens along a side")
    parser.add_argument("--dtype", choices=overhead.DTYPES, default="float32")
    overhead.common_options(parser, rounds=7)
    ask = parser.parse_args()
    stem = overhead.results("magnet_memory", ask.device)
    report = overhead.kept(stem, overhead.described(ask.device, ask.clock))
    if not ask.fresh and any(_cell(row) == (ask.side, ask.dtype) for row in report["rows"]):
        print(f"side {ask.side} {ask.dtype}: in {stem.name}.json already; --fresh measures it again")
        return
    others = [row for row in report["rows"] if _cell(row) != (ask.side, ask.dtype)]
    found = measure(ask.side, ask.dtype, ask.device, ask.rounds, ask.clock)
    for row in found:
        print(f"{row['way']}: {shown(row['ratios'], ask.clock)[0]} x time, {mebibytes(row['added_bytes'])} MiB")
    report["rows"] = sorted(others + found, key=_cell)
    if not ask.no_write:
        overhead.write(stem, report, markdown(report))
        print(f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    run_script(main)
