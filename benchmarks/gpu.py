"""All that only a GPU can answer, in one run of some minutes: exact there, unchanged there, and at what cost.

    python benchmarks/gpu.py --minutes 9 --out gpu-results          # on a machine with a GPU
    python benchmarks/gpu.py --device cpu --minutes 1 --out small   # the same in small, to see that it works

Parts, the most worth first; `--part` picks some:

    kernels     log-sum-exp, masses and maps of every attention kernel against float64: `mmdit-probe doctor --deep`
    tests       pytest -m gpu
    unchanged   is the output of SD3-, SD3.5-, Flux- and Qwen-Image-size transformers and pipelines bitwise that without
                the probe: in bfloat16 and float16, compiled, offloaded, under autocast, with a LoRA; masses to float64
    cost        time (device events) and peak memory of masses, norms, maps and blur at 1024, 4096 and 9216 image tokens
    host        processor time of a denoising call of 24 layers x 24 heads, by where the rows go
    magnet      memory and time of a training step with maps at SD3-medium size

Widths are the real models', weights are random, layers are fewer. On a processor heads, tokens and rounds are fewer
still, one precision is tried, and tests that need a GPU are skipped: the report says so. Every part runs in a process
of its own, so that one that hangs, runs out of memory or breaks the device ends alone; what it does not use of its
share of the time is the next ones'. Three files come of it: a row is added to DIR/rows.jsonl as it is found, what parts
print to DIR/log.txt, and DIR/report.md is written after every part. Exit code 1: a part failed, or found something
wrong; a missed target, and what the time did not allow, is told, no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_probe.errors import run_script
from mmdit_probe.models.names import device_name

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARTS = {"kernels": 1.0, "tests": 3.0, "unchanged": 4.0, "cost": 4.0, "host": 1.0, "magnet": 1.5}
"""Parts in order, with their share of the time."""
IN_SMALL = {
    "kernels": "those of a processor",
    "tests": "collected; each needs a CUDA device and is skipped",
    "unchanged": "bfloat16, 1 head, 16 image tokens, every way of one size, every size as a pipeline",
    "cost": "1 head, 16 image tokens, 7 rounds; what a way costs beside so small a forward says nothing",
    "host": "2 layers x 2 heads, 5 calls; no device to wait for",
    "magnet": "float32, 2 heads, 16 image tokens, 2 rounds",
}
"""What each part leaves out on a processor."""
TARGETS = {"masses": 1.02, "norms": 1.02, "maps": 1.05, "blur": 1.03}
MEMORY_TARGET = 1.05
GRACE = 10.0
"""Seconds that a part may take beyond its time to finish a row."""


@dataclass(frozen=True)
class Task:
    """What a part is told: where to run, how long, and whether only to try it in small."""

    device: str
    ends: float

    @property
    def small(self) -> bool:
        return not self.device.startswith("cuda")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.time()

    def within(self, cells: Sequence[Any]) -> Iterator[Any]:
        """The cells, as long as there is time."""
        for number, cell in enumerate(cells):
            if self.left < 0:
                raise OutOfTime(f"its time was up after {number} of {len(cells)} cells")
            yield cell


class OutOfTime(Exception):
    """What a part has found stands; the rest was not tried."""


Rows = Iterator[dict[str, Any]]


def kernels(task: Task) -> Rows:
    """Every kernel, precision and case; `ok` unless one is wrong."""
    from mmdit_probe.attention import kernels as tried

    for row in tried.rows(task.device):
        yield row | {"ok": row["status"] != "fail"}


def tests(task: Task) -> Rows:
    """One row for each test that ran, and for what pytest could not do."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "gpu" in path.read_text("utf-8"))
    workers = "0" if task.small else str(min(8, os.cpu_count() or 1))
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-n", workers, "--tb=short", "-p", "no:cacheprovider"]
    line += files
    running = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, count = [], 0
    assert running.stdout is not None
    for text in running.stdout:
        said.append(text.rstrip())
        found = ended_test(text)
        if found:
            count += 1
            yield {"test": found[0], "status": found[1].lower(), "ok": found[1] not in ("FAILED", "ERROR")}
    if running.wait() not in (0, 1) or not count:
        yield {"test": "pytest", "status": f"exit code {running.returncode}", "ok": False, "says": said[-30:]}
    elif running.returncode:
        yield {"test": "pytest", "status": "failures", "ok": False, "says": said[-200:]}


def ended_test(line: str) -> tuple[str, str] | None:
    """A test and how it ended, where a line of pytest -vv tells that, in one process or in several."""
    how = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    apart = re.match(rf"\[gw\d+\] \[ *\d+%\] {how} (\S+::.+)", line)
    if apart:
        return apart[2].rstrip(), apart[1]
    alone = re.match(rf"(\S+::.+?) {how}\b", line)
    return (alone[1], alone[2]) if alone else None


def unchanged(task: Task) -> Rows:
    """One row for each model size, precision and way of running it."""
    import sizes

    cells = list(itertools.product(WAYS, ("bfloat16", "float16"), sizes.SIZES))
    if task.small:
        first = next(iter(sizes.SIZES))
        cells = [cell for cell in cells if cell[1] == "bfloat16" and (cell[2] == first or cell[0] == "pipeline")]
    for way, dtype, blocks in task.within(cells):
        row = {"blocks": blocks, "dtype": dtype, "way": way}
        try:
            yield row | compared(blocks, dtype, way, task)
        except Exception as error:
            yield row | {"ok": False, "reason": f"{type(error).__name__}: {first_line(error)}"}
        released(task.device)


PREPARED: dict[str, Callable[[Any, str], Any]] = {
    "pipeline": lambda target, device: None,
    "lora": lambda target, device: with_lora(target.transformer),
    "offload model": lambda target, device: target.enable_model_cpu_offload(device=device),
    "offload sequential": lambda target, device: offloaded(target.transformer, device),
    "offload group": lambda target, device: target.transformer.enable_group_offload(
        onload_device=device, offload_device="cpu", offload_type="leaf_level"
    ),
}
"""Ways of running a pipeline, and what makes them so."""
WAYS = ("eager", "autocast", *PREPARED, "compiled")
"""Compiling takes longest, so it comes last."""


def with_lora(transformer: Any) -> None:
    import torch
    from peft import LoraConfig

    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def offloaded(transformer: Any, device: str) -> None:
    """What `enable_sequential_cpu_offload` does to each of a pipeline's models."""
    import torch
    from accelerate import cpu_offload

    cpu_offload(transformer, execution_device=torch.device(device))


def compared(blocks: str, dtype: str, way: str, task: Task) -> dict[str, Any]:
    """The output with the probe against that without it, before and after; the largest error of a mass."""
    import torch

    from mmdit_probe import AttentionMass, TextMaps, ValueNorm, probe

    run, target = subject(blocks, dtype, way, task)
    with torch.no_grad():
        stock, checked = run(), None
        repeated = torch.equal(run(), stock)
        with probe(target, AttentionMass(), ValueNorm(), TextMaps()):
            seen = run()
        after = run()
        if way in ("eager", "autocast"):
            checked = checker()
            with probe(target, checked):
                run()
    # A compiled graph with the probe's operator in it is another graph: its sums may be grouped in another order.
    close = torch.allclose(seen.float(), stock.float(), rtol=2e-2, atol=2e-2)
    same = torch.equal(seen, stock)
    error = None if checked is None else checked.largest
    return {
        "repeatable": repeated, "same": same, "same_after": torch.equal(after, stock),
        "largest_difference": float((seen.float() - stock.float()).abs().max()), "mass_error": error,
        "ok": (close if way == "compiled" else same) and torch.equal(after, stock) and (error or 0) < 6e-5,
    }  # fmt: skip


def subject(blocks: str, dtype: str, way: str, task: Task) -> tuple[Callable[[], Any], Any]:
    """What runs, and what is probed."""
    import sizes
    import torch

    tokens, heads = (16, 1) if task.small else (1024, None)
    built = "float32" if way == "autocast" else dtype
    transformer, forward = sizes.build(blocks, tokens, built, task.device, heads)
    if way in ("eager", "autocast"):
        kind = getattr(torch, dtype)

        def run() -> Any:
            device = task.device.split(":")[0]
            with torch.autocast(device, kind) if way == "autocast" else contextlib.nullcontext():
                return forward()

        return run, transformer
    if way == "compiled":
        transformer.compile(backend="aot_eager" if task.small else "inductor")
        return forward, transformer
    pipe = pipeline(blocks, transformer)
    PREPARED[way](pipe, task.device)
    return lambda: sampled(pipe, blocks, tokens, getattr(torch, dtype), task.device), pipe


def pipeline(blocks: str, transformer: Any) -> Any:
    """The stock pipeline on a transformer, without text encoders and autoencoder."""
    import diffusers

    name = {"flux": "FluxPipeline", "qwen-image": "QwenImagePipeline"}.get(blocks, "StableDiffusion3Pipeline")
    made = getattr(diffusers, name)
    parts = dict.fromkeys(made._get_signature_keys(made)[0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = made(**(parts | {"transformer": transformer, "scheduler": scheduler}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: Any, blocks: str, tokens: int, dtype: Any, device: str) -> Any:
    """Latents of two steps, from text embeddings."""
    import sizes
    import torch

    generator = torch.Generator().manual_seed(0)
    side, config = 16 * int(tokens**0.5), pipe.transformer.config

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    text = draw(1, sizes.TEXT[blocks], config.joint_attention_dim)
    inputs: dict[str, Any] = {"prompt_embeds": text}
    if "pooled_projection_dim" in config:
        inputs["pooled_prompt_embeds"] = draw(1, config.pooled_projection_dim)
    if blocks.startswith("sd3"):
        inputs |= {f"negative_{name}": -value for name, value in inputs.items()}
    if blocks == "qwen-image":
        inputs["prompt_embeds_mask"] = torch.ones(text.shape[:2], dtype=torch.long, device=device)
    options = {"num_inference_steps": 2, "height": side, "width": side, "output_type": "latent"}
    return pipe(**inputs, **options, generator=generator).images


def checker() -> Any:
    """An observer that compares each layer's masses with the explicit softmax in float64."""
    import torch

    from mmdit_probe.attention import reference
    from mmdit_probe.observe.mass import KeyGroups, attention_masses
    from mmdit_probe.observe.observer import Observer

    class Checked(Observer):
        needs = "lse"
        largest = 0.0

        def measure(self, seen: Any) -> Any:
            call, kinds = seen.call, seen.layout.labels.to(seen.call.query.device)  # 0 image, 1 text
            groups = [[2] * seen.layout.counts["text"] for _ in seen.denoising.prompts]
            keys = KeyGroups.of(seen.layout, groups, call.query.device)
            masses, _ = attention_masses(call, seen.lse, keys)  # [B, H, 2, image | other | text]
            errors = []
            for head in range(call.query.shape[1]):  # one at a time: float64 of all of them is large
                one = slice(head, head + 1)
                dense = reference.probabilities(call.query[:, one], call.key[:, one], call.attn_mask)
                for query in (0, 1):
                    rows = dense.to(kinds.device)[:, 0, kinds == query].mean(1)  # [B, N]
                    wanted = torch.stack([rows[:, kinds == key].sum(-1) for key in (0, 2, 1)], -1)
                    errors.append((masses[:, head, query].double() - wanted).abs().max())
            return torch.stack(errors).max()

        def commit(self, denoising: Any, measured: dict[int, Any]) -> None:
            self.largest = max(self.largest, *(float(error) for error in measured.values()))

    return Checked()


def cost(task: Task) -> Rows:
    """Rows of `scaling.measure` against this benchmark's targets; the sizes asked for most come first."""
    import scaling

    scaling.TARGETS = TARGETS
    heads, lengths, rounds = (1, (16,), 7) if task.small else (None, (4096, 1024, 9216), 15)
    for tokens, blocks in task.within(list(itertools.product(lengths, scaling.BLOCKS))):
        for row in scaling.measure(blocks, tokens, "bfloat16", task.device, rounds, "wall", heads):
            memory = row["peak_ratio"]
            yield row | {
                "ok": True, "memory_met": None if memory is None or not row["target"] else memory <= MEMORY_TARGET
            }  # fmt: skip
        released(task.device)


def host(task: Task) -> Rows:
    """Processor and wall time of a call whose tensors are small, so that what remains is the host's work."""
    import tempfile

    import sizes
    from overhead import Dropped

    from mmdit_probe import AttentionMass, ValueNorm, probe
    from mmdit_probe.results import TableWriter

    layers, heads = (2, 2) if task.small else (24, 24)
    transformer, forward = sizes.build("sd3-medium", 16, "bfloat16", task.device, heads, layers)
    forward()
    for way in ("stock", "dropped", "in memory", "on disk"):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            sinks: list[Any] = [None, None] if way == "in memory" else [Dropped(), Dropped()]
            if way == "on disk":
                sinks = [stack.enter_context(TableWriter(folder, name).item(0)) for name in ("masses", "norms")]
            if way != "stock":
                stack.enter_context(probe(transformer, AttentionMass(sinks[0]), ValueNorm(sinks[1])))
            calls, processor, wall = timed_calls(forward, task)
        yield {"rows": way, "layers": layers, "heads": heads, "calls": calls, "ok": True,
               "processor_ms": processor, "wall_ms": wall}  # fmt: skip


def timed_calls(forward: Callable[[], Any], task: Task) -> tuple[int, float, float]:
    """How many calls were timed, and milliseconds of each: of all threads' processor time, and by the wall clock."""
    import torch

    forward()
    begin, wall, calls = time.process_time(), time.perf_counter(), 0
    while calls < 5 or (time.perf_counter() - wall < 3 and not task.small):
        forward()
        calls += 1
    if not task.small:
        torch.cuda.synchronize()
    return calls, 1000 * (time.process_time() - begin) / calls, 1000 * (time.perf_counter() - wall) / calls


def magnet(task: Task) -> Rows:
    """Rows of `magnet_memory.measure`."""
    import magnet_memory

    side, dtype, rounds, heads = (4, "float32", 2, 2) if task.small else (64, "bfloat16", 7, magnet_memory.HEADS)
    for row in magnet_memory.measure(side, dtype, task.device, rounds, "wall", heads):
        yield row | {"ok": True}


def released(device: str) -> None:
    """Give back what a finished row held."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    torch.compiler.reset()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def work(name: str, task: Task, out: Path) -> None:
    """One part in this process: a line in the file for every row."""
    with (out / "rows.jsonl").open("a", encoding="utf-8") as lines:
        try:
            for row in globals()[name](task):
                lines.write(json.dumps({"part": name} | row) + "\n")
                lines.flush()
        except OutOfTime as error:
            print(f"{LEFT}{error}")


LEFT = "left out: "


def apart(name: str, task: Task, out: Path) -> dict[str, Any]:
    """One part in a process of its own: what came of it."""
    began = time.time()
    line = [sys.executable, __file__, "--worker", name, str(task.ends), "--device", task.device, "--out", str(out)]
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n=== {name}\n")
        log.flush()
        running = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            failed = f"exit code {running.returncode}: {last_line(out)}" if running.wait(task.left + GRACE) else ""
        except subprocess.TimeoutExpired:
            failed = "stopped: its time was up"
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    file = out / "rows.jsonl"
    every = [json.loads(text) for text in file.read_text("utf-8").splitlines()] if file.is_file() else []
    rows = [{key: value for key, value in row.items() if key != "part"} for row in every if row["part"] == name]
    said = last_line(out)
    return {
        "part": name, "seconds": time.time() - began, "rows": rows, "wrong": [row for row in rows if not row["ok"]],
        "failed": failed or ("" if rows or said.startswith(LEFT) else "it found nothing"),
        "left": said.removeprefix(LEFT) if said.startswith(LEFT) else "",
    }  # fmt: skip


def last_line(out: Path) -> str:
    return (out / "log.txt").read_text("utf-8", errors="replace").strip().splitlines()[-1]


def report(done: list[dict[str, Any]], device: str, card: str) -> str:
    """All parts in markdown, the verdicts first."""
    import torch

    small = not device.startswith("cuda")
    lines = ["# In small, on a processor" if small else "# What was seen on a GPU", ""]
    lines += [f"Made by `python benchmarks/gpu.py`. {card}, torch {torch.__version__}.", ""]
    lines += ["| part | seconds | rows | wrong | ended |", "|-|-:|-:|-:|-|"]
    for part in done:
        counts = f"{part['seconds']:.0f} | {len(part['rows'])} | {len(part['wrong'])}"
        lines.append(f"| {part['part']} | {counts} | {part['failed'] or part['left'] or 'well'} |")
    for part in done:
        lines += ["", f"## {part['part']}", ""]
        lines += [f"In small: {IN_SMALL[part['part']]}.", ""] if small else []
        lines += table(SHOWN[part["part"]](part["rows"])) if part["rows"] else ["Nothing was found."]
    return "\n".join(lines) + "\n"


def of_kernels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from mmdit_probe.attention.kernels import summary

    return summary(rows)


def of_tests(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many ended in which way, then those that failed."""
    counts = [{"test": "all", "status": f"{n} {name}"} for name, n in Counter(row["status"] for row in rows).items()]
    return counts + [{"test": row["test"], "status": row["status"]} for row in rows if not row["ok"]]


def of_cost(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("blocks", "image_tokens", "way", "seconds", "ratio", "other_clock", "verdict", "peak_ratio", "memory_met")
    return [{name: (row | of_ratios(row))[name] for name in names} for row in rows]


def of_magnet(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("side", "heads", "dtype", "way", "rounds", "seconds", "ratio", "other_clock", "added_bytes", "peak_ratio")
    return [{name: (row | of_ratios(row))[name] for name in names} for row in rows]


def of_ratios(row: dict[str, Any]) -> dict[str, str]:
    from overhead import shown

    return dict(zip(("ratio", "other_clock"), shown(row["ratios"], "wall"), strict=True))


SHOWN: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "kernels": of_kernels, "tests": of_tests, "unchanged": list, "cost": of_cost, "host": list,
    "magnet": of_magnet,
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of equal or unequal keys as lines of markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "-|" * len(names)]
    return lines + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]


def cell(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(cell(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, logs and the report")
    parser.add_argument("--device", type=device_name, default="cuda", help="cpu: everything in small")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        name, ends = options.worker
        work(name, Task(options.device, float(ends)), options.out)
        return
    (options.out / "rows.jsonl").unlink(missing_ok=True)
    (options.out / "log.txt").unlink(missing_ok=True)
    ends, done = time.time() + 60 * options.minutes, []
    card = named(options.device)
    names = [name for name in PARTS if name in (options.part or PARTS)]
    for number, name in enumerate(names):
        share = PARTS[name] / sum(PARTS[left] for left in names[number:])
        part = apart(name, Task(options.device, time.time() + share * (ends - time.time() - GRACE)), options.out)
        done.append(part)
        (options.out / "report.md").write_text(report(done, options.device, card), encoding="utf-8")
        told = f"{len(part['rows'])} rows, {len(part['wrong'])} wrong, {part['seconds']:.0f} s"
        print(f"{name}: {told} {part['failed'] or part['left']}".rstrip(), flush=True)
    print(f"written: {options.out / 'report.md'}")
    sys.exit(any(part["wrong"] or part["failed"] for part in done))


def named(device: str) -> str:
    """The machine in words; in a process of its own, so that this one holds nothing of a GPU."""
    line = f"import overhead; print(overhead.machine({device!r})[0])"
    done = subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or f"unknown: {done.stderr.strip().splitlines()[-1]}"


if __name__ == "__main__":
    run_script(main)
