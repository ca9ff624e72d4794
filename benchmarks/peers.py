"""What other tools cost on the same blocks, and how exact they are: time, memory, error, and is the output unchanged?

    python benchmarks/peers.py --clones DIR               # benchmarks/results/peers-<kind>.{json,md}
    python benchmarks/peers.py --clones DIR --blocks flux --tokens 1024 --rounds 7

None of their code stands here. `attention-map-diffusers` and `nnsight` are used if they are installed; DIR holds clones
of the others, a folder each: cvlab-kaist/Seg4Diff as `Seg4Diff`, helblazer811/ConceptAttention as `ConceptAttention`
(needs einops), TeaWhiteBro/AttLine as `AttLine`. What is missing is left out, and the page says so.

Blocks, random weights and the ways `masses`, `norms`, `maps` are those of `scaling.py`. Each tool reads all layers
of one forward, in its default setting; what it makes of them after the forward is part of its time. `explicit` holds
softmax(q k^T) in float32. `again` is stock once more: the noise. Error: the largest difference, over the largest value,
between what a tool says of the first layer and the same computed in float64 from the stock forward's own q and k (of
`masses`: of every layer). A cell that the result file has is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import overhead
import scaling
from overhead import CLOCKS, mebibytes, shown
from sizes import TEXT, build

from mmdit_probe.errors import UserError, at_least, run_script

OURS = ("stock", "again", "masses", "norms", "maps", "explicit")
Run = Callable[[], tuple[Any, Any]]
"""One forward: its output, and what a tool says of the first layer."""


class Subject:
    """The transformer that all tools look at.

    Attributes:
        inputs: of its forward. calls: the attention calls of one stock forward, a layer each.
    """

    def __init__(self, blocks: str, tokens: int, dtype: str, device: str, clones: Path, heads: int | None) -> None:
        self.blocks, self.tokens, self.text, self.clones = blocks, tokens, TEXT[blocks], clones
        self.transformer, self.forward = build(blocks, tokens, dtype, device, heads)
        self.inputs: dict[str, Any] = {}
        self.calls: list[Any] = []

        def keep(call: Any, module_call: Any, proceed: Any) -> Any:
            self.calls.append(call)
            return proceed(call)

        hook = self.transformer.register_forward_pre_hook(
            lambda _, args, named: self.inputs.update(named), with_kwargs=True
        )
        with overhead.caught(self.transformer, keep, "output"):
            self.output = self.forward()
        hook.remove()

    @property
    def image(self) -> slice:
        """Positions of the image among the joint tokens of the first layer: SD3 has it first, Flux last."""
        return slice(0, self.tokens) if self.blocks.startswith("sd3") else slice(self.text, None)

    @property
    def words(self) -> slice:
        return slice(self.tokens, None) if self.blocks.startswith("sd3") else slice(0, self.text)

    def probabilities(self, layer: int = 0) -> Any:
        """I2T [I, T] in float64, mean over heads; a head at a time."""
        from mmdit_probe.attention import reference

        call, total = self.calls[layer], 0
        for head in range(call.query.shape[1]):
            of = reference.probabilities(call.query[:1, head : head + 1, self.image], call.key[:1, head : head + 1])
            total = total + of[0, 0, :, self.words]
        return total / call.query.shape[1]

    def products(self) -> Any:
        """q k^T of text keys and image queries [T, I] in float64, mean over heads, without scale."""
        call = self.calls[0]
        query, key = call.query[0, :, self.image].double(), call.key[0, :, self.words].double()
        return sum(k @ q.mT for q, k in zip(query, key, strict=True)) / len(query)


@contextlib.contextmanager
def explicit(subject: Subject) -> Iterator[Run]:
    import torch

    from mmdit_probe.attention import reference

    seen: list[Any] = []

    def attend(call: Any, module_call: Any, proceed: Any) -> Any:
        attention = reference.probabilities(call.query, call.key, dtype=torch.float32)
        seen.append(attention[:, :, subject.image, subject.words].mean(1))
        return (attention @ call.value.float()).to(call.value.dtype)

    with overhead.caught(subject.transformer, attend, "output"):
        yield lambda: (subject.forward(), _taken(seen)[0][0])


@contextlib.contextmanager
def maps(subject: Subject) -> Iterator[Run]:
    from mmdit_probe import TextMaps, probe

    def run() -> tuple[Any, Any]:
        with probe(subject.transformer, TextMaps()) as seen:
            output = subject.forward()
        return output, seen[TextMaps].maps(layer=0, branch=None)[0].flatten(0, 1)

    yield run


@contextlib.contextmanager
def masses(subject: Subject, way: str = "masses") -> Iterator[Run]:
    with scaling.attached(way, subject.transformer):
        yield lambda: (subject.forward(), None)


@contextlib.contextmanager
def attention_map_diffusers(subject: Subject) -> Iterator[Run]:
    from attention_map_diffusers import AttentionCapture

    pipeline = SimpleNamespace(transformer=subject.transformer)

    def run() -> tuple[Any, Any]:
        with AttentionCapture(pipeline) as capture:
            output = subject.forward()
        return output, capture.compute().records[0].data[0, 0]

    yield run


@contextlib.contextmanager
def seg4diff(subject: Subject) -> Iterator[Run]:
    """Its processor, with the settings of its configs: softmax, mean over heads, every layer; no features kept."""
    path = subject.clones / "Seg4Diff/diffusers/src/diffusers/models/attention_processor.py"
    processor = _module("diffusers.models._seg4diff", path).JointAttnProcessor2_0
    blocks = subject.transformer.transformer_blocks
    before = [block.attn.processor for block in blocks]
    for block in blocks:
        block.attn.set_processor(processor())
        settings = {"softmax": True, "softmax_i2t_only": False, "head": None, "keep_head": False, "max_head": False}
        vars(block.attn.processor).update(settings, feat_cache=None)

    def run() -> tuple[Any, Any]:
        for block in blocks:
            block.attn.processor.attn_cache = []
        output = subject.forward()
        return output, blocks[0].attn.processor.attn_cache[0]

    yield run
    for block, processor in zip(blocks, before, strict=True):
        block.attn.set_processor(processor)


@contextlib.contextmanager
def concept_attention(subject: Subject) -> Iterator[Run]:
    """Its transformer with our weights and five concepts."""
    import torch

    path = subject.clones / "ConceptAttention/concept_attention/sd3/dit_block.py"
    kind = _module("_concept_attention", path).CustomSD3Transformer2DModel
    with torch.device("meta"):
        custom = kind.from_config(dict(subject.transformer.config))
    custom.load_state_dict(subject.transformer.state_dict(), assign=True)
    concepts = subject.inputs["encoder_hidden_states"][:, :5]

    def run() -> tuple[Any, Any]:
        with torch.no_grad():
            output, found = custom(**subject.inputs, concept_hidden_states=concepts)
        return output, found["cross_attention_maps"][0, 0]

    yield run


@contextlib.contextmanager
def nnsight(subject: Subject) -> Iterator[Run]:
    """Saved projections of every block, and the softmax of each made of them after the forward."""
    import torch
    from nnsight import NNsight

    model = NNsight(subject.transformer)
    heads = subject.transformer.config.num_attention_heads

    def run() -> tuple[Any, Any]:
        saved: list[Any] = []
        with torch.no_grad(), model.trace(**subject.inputs):
            for block in model.transformer_blocks:
                attn = block.attn
                saved.append([part.output.save() for part in (attn.to_q, attn.to_k, attn.add_k_proj)])
            saved.append(model.output.save())
        *saved, output = saved
        found = []
        for image_query, image_key, text_key in saved:
            query = image_query.unflatten(-1, (heads, -1)).transpose(1, 2)
            key = torch.cat([image_key, text_key], 1).unflatten(-1, (heads, -1)).transpose(1, 2)
            scores = query.float() @ key.float().mT / math.sqrt(key.shape[-1])
            found.append(scores.softmax(-1)[..., subject.tokens :].mean(1))
        return output[0], found[0][0]

    yield run


@contextlib.contextmanager
def attline(subject: Subject) -> Iterator[Run]:
    """The mass of all text on each image token, which it averages over layers."""
    with _path(subject.clones / "AttLine"):
        from attline.capture import CaptureState, set_capture_state
        from attline.layouts import build_flux2_klein_layout
        from attline.patch import _swap_attention_backend

        side = math.isqrt(subject.tokens)
        layout = build_flux2_klein_layout(text_count=subject.text, noise_hw=(side, side), image_hws=[])
        restore, pair = _swap_attention_backend(), ("noise", "text")

        def run() -> tuple[Any, Any]:
            state = CaptureState(save_dir=tempfile.gettempdir(), attention_pairs=[pair])
            state.set_layout(layout)
            set_capture_state(state)
            output = subject.forward()
            set_capture_state(None)
            return output, state.accumulators[pair].mean_map().flatten()

        yield run
        restore()


@contextlib.contextmanager
def _path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _module(name: str, path: Path) -> ModuleType:
    """A file of a clone as a module of that name; its relative imports are those of the package the name lies in."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no file {path.name} in the clone")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _taken(seen: list[Any]) -> list[Any]:
    """What was gathered since the last time."""
    found, seen[:] = list(seen), []
    return found


def _plain(subject: Subject) -> Any:
    return contextlib.nullcontext(lambda: (subject.forward(), None))


def _mass(subject: Subject) -> Any:
    """I2T summed over text keys [I], mean over layers."""
    layers = range(len(subject.calls))
    return sum(subject.probabilities(layer).sum(-1) for layer in layers) / len(layers)


WAYS: dict[str, tuple[Callable[[Subject], Any], str, Callable[[Subject], Any] | None]] = {
    "stock": (_plain, "", None),
    "again": (_plain, "", None),
    "masses": (masses, "five masses of every head", None),
    "norms": (lambda subject: masses(subject, "norms"), "masses, and norms of the values, of every head", None),
    "maps": (maps, "I2T, mean over heads", Subject.probabilities),
    "explicit": (explicit, "I2T, mean over heads", Subject.probabilities),
    "attention-map-diffusers": (attention_map_diffusers, "I2T, mean over heads", Subject.probabilities),
    "Seg4Diff": (seg4diff, "I2T of 77 text tokens, mean over heads", lambda of: of.probabilities()[:, :77]),
    "ConceptAttention": (concept_attention, "outputs of concepts; q k^T, mean over heads", Subject.products),
    "nnsight": (nnsight, "I2T, mean over heads", Subject.probabilities),
    "AttLine": (attline, "I2T summed over text, mean over heads and layers", _mass),
}
"""Each tool: how it is attached, what it gives, and the same in float64."""
OF_BLOCKS = {
    "sd3-medium": tuple(way for way in WAYS if way != "AttLine"),
    "flux": (*OURS, "attention-map-diffusers", "AttLine"),
}
"""AttLine knows Flux and Qwen-Image, Seg4Diff's processor and ConceptAttention's transformer here those of SD3."""


def examined(subject: Subject, way: str) -> dict[str, Any]:
    """Whether the output stays as it was, and the error of what a way says."""
    import torch

    attach, gives, truth = WAYS[way]
    with attach(subject) as run:
        output, said = run()
    row = {"gives": gives, "unchanged": torch.equal(output, subject.output), "error": None, "remark": ""}
    row["difference"] = float((output.float() - subject.output.float()).abs().max())
    if way == "masses":
        import gpu

        from mmdit_probe import probe

        with probe(subject.transformer, checked := gpu.checker()):
            subject.forward()
        row["error"] = checked.largest
    elif truth is not None:
        expected = truth(subject)
        if said.shape == expected.shape:
            row["error"] = float((said.double() - expected).abs().max() / expected.abs().max())
        else:
            row["remark"] = f"gives {list(said.shape)} where {list(expected.shape)} was expected"
    return row


def measure(subject: Subject, device: str, rounds: int, clock: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each tool that runs here, and why each other one does not."""
    found, absent = {}, {}
    for way in OF_BLOCKS[subject.blocks]:
        try:
            found[way] = examined(subject, way)
        except Exception as error:
            absent[way] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def attach(way: str) -> Any:
        return WAYS[way][0](subject)

    peaks = overhead.peaks_of(list(found), attach, subject.forward, device)
    seconds = overhead.in_turns(list(found), attach, subject.forward, device, rounds)
    rows = overhead.compared(seconds, peaks, clock, "stock")
    return [row | found[row["way"]] | {"rounds": rounds} for row in rows], absent


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Other tools on the same blocks",
        "",
        "Made by `python benchmarks/peers.py`, which says what was done with each.",
        f"{report['machine']}, torch {report['torch']}, {report['threads']} threads; {CLOCKS[report['clock']]}.",
        "Two layers of the real sizes, random weights, batch 1. Ratios are against the stock forward of the same",
        "round, median and 95 % interval over rounds; `again` is stock once more: the noise. 'added' is the peak over",
        "what was held before. Error: largest difference to float64 over the largest value.",
    ]
    for cell in report["rows"]:
        heads = f", {cell['heads']} heads" if cell["heads"] else ""
        lines += ["", f"## {cell['blocks']}, {cell['tokens']} image tokens, {cell['dtype']}{heads}", ""]
        lines += ["| way | gives | rounds | s / forward | time ratio | other clock | added MiB | peak ratio | error | "
                  "output unchanged? |", "|-|-|-:|-:|-:|-:|-:|-:|-:|-|"]  # fmt: skip
        for row in cell["ways"]:
            memory = "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}"
            error = row["remark"] or ("" if row["error"] is None else f"{row['error']:.1e}")
            same = "yes" if row["unchanged"] else f"no: {row['difference']:.1e}"
            cells = (row["way"], row["gives"], str(row["rounds"]), f"{row['seconds']:.3f}")
            cells += (*shown(row["ratios"], report["clock"]), mebibytes(row["added_bytes"]), memory, error, same)
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"* left out: {way} ({why})" for way, why in cell["absent"].items())] if cell["absent"] else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, required=True, help="folder of the clones")
    parser.add_argument("--blocks", choices=OF_BLOCKS, action="append", help="default: both")
    parser.add_argument("--tokens", type=scaling.square, default=4096, help="image tokens, a square number")
    parser.add_argument("--heads", type=at_least(1), help="fewer than the real model's, to try it in small")
    parser.add_argument("--dtype", choices=overhead.DTYPES, default="bfloat16")
    overhead.common_options(parser, rounds=7)
    options = parser.parse_args()
    if not options.clones.is_dir():
        raise UserError(f"--clones: no folder {str(options.clones)!r}; expected the folder of the clones")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # a tool's remark on every call is no part of what it costs
    stem = overhead.results("peers", options.device)
    report = overhead.kept(stem, overhead.described(options.device, options.clock))
    for blocks in options.blocks or OF_BLOCKS:
        cell = {"blocks": blocks, "tokens": options.tokens, "heads": options.heads, "dtype": options.dtype}
        of_cell = [one for one in report["rows"] if cell.items() <= one.items()]
        if of_cell and not options.fresh:
            print(f"{blocks} {options.tokens} {options.dtype}: in {stem.name}.json already; --fresh measures it again")
            continue
        subject = Subject(blocks, options.tokens, options.dtype, options.device, options.clones, options.heads)
        rows, absent = measure(subject, options.device, options.rounds, options.clock)
        report["rows"] = [one for one in report["rows"] if one not in of_cell] + [
            cell | {"ways": rows, "absent": absent}
        ]
        if options.no_write:
            print(markdown(report))
        else:
            overhead.write(stem, report, markdown(report))
            print(f"{blocks} {options.tokens} {options.dtype} written: {stem}.json, {stem}.md", flush=True)


if __name__ == "__main__":
    run_script(main)
