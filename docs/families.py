"""The docs' pages of model families, from the registry and the table of situations. Nothing of a model is loaded.

page = family_page(FAMILIES["flux"], tried("flux", FAMILIES["flux"].pipelines, table))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mmdit_probe.models.families.facts import Family, TextStream
from mmdit_probe.models.families.registry import FAMILIES

INTRODUCTION = """\
Every joint-attention family of diffusers is observed by the same `probe`, through its stock pipeline or bare
transformer. In every stock pipeline that encodes its prompts by `encode_prompt`, guidance branches and words are
labelled, templates and pads apart from them; elsewhere (Flux.3, OmniGen, embeddings of one's own) pass token tables
with `tokens=`. Words are "unknown", with a warning, where a pipeline reads more than the family's others do: a
picture (LongCat-Image-Edit, HunyuanVideo from a picture), or text cleaned in another way (PRXPixel). `load` and
`--model` take the pipelines of the last column, without the rewriting of prompts that some of them do.

A model that nobody described is laid out mechanically, by perturbing its inputs with attention replaced by the
identity; `mmdit-probe models inspect DIRECTORY` prints what was found. Models with cross-attention (PixArt, Wan, Sana,
LTX, FIBO 2) are refused: their image and text never share a softmax. So are Qwen-Image 2.1 and Cosmos 3, whose text
attends in a call of its own.
"""
PROMPT = '"a cat on a sofa"'


def tried(name: str, pipelines: Sequence[str], table: str) -> list[tuple[str, str]]:
    """(way of running, what came out) of a family's transformer and pipelines, from the table of situations.

    Args:
        pipelines: its stock text-to-image pipelines; those that begin with a picture have their names.
    """
    stems = "|".join(re.escape(pipeline.removesuffix("Pipeline")) for pipeline in pipelines)
    of_pipelines = f"|({stems})(Img2Img|Inpaint|PAG)?Pipeline pipeline" if stems else ""
    known = re.compile(f"{name}( pipeline)?{of_pipelines}")
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) >= 4 and any(known.fullmatch(subject) for subject in cells[1].split(", ")):
            outcome = cells[2].partition(":")[0] + (f" (within {cells[3]})" if cells[3] else "")
            found.append((cells[0], outcome))
    return found


def stream_line(stream: TextStream) -> str:
    """What one text stream is, in a sentence."""
    facts = [f"`{', '.join(stream.tokenizers)}`"]
    facts.append(f"reads {stream.reads or 'the whole prompt'}")
    if stream.wrap is not None or stream.tail is not None:
        facts.append("in a template, whose tokens are of kind `template`")
    if stream.cut is not None:
        facts.append("the template's first tokens are cut off by the pipeline")
    facts.append("padded to its full length" if stream.padded else "as long as the prompt")
    return f"* **{stream.name}**: {'; '.join(facts)}."


def recipe(family: Family) -> Iterator[str]:
    """Lines that show how a model of the family is probed."""
    if not family.pipelines:
        yield f"`load` and the commands take none of its pipelines: {family.not_loaded}."
        yield from ("Load it with diffusers and give it, or its transformer alone, to `probe`:", "", "```python")
        yield from ("from mmdit_probe import AttentionMass, probe", "", "with probe(pipe, AttentionMass()) as run:")
        yield from ('    pipe("a cat on a sofa")', "run[AttentionMass].table()", "```")
        return
    yield f"`--model` takes a folder or hub id of a {' or '.join(family.pipelines)}:"
    prompt = "'a sign that says \"OPEN\"'" if all(stream.reads for stream in family.streams) else PROMPT
    yield from ("", "```sh", f"mmdit-probe maps {prompt} --model MODEL --device cuda", "```")


def family_page(family: Family, rows: Sequence[tuple[str, str]]) -> str:
    """The page of one family."""
    layers = (family.layers,) if isinstance(family.layers, str) else family.layers
    paths = [re.sub(r"\(\\d\+\)", "N", pattern).replace("\\", "") for pattern in layers]
    lines = [f"# {family.name}", "", f"`{family.transformer}` of diffusers.", "", *recipe(family), ""]
    lines += [
        "## Layers and tokens",
        "",
        f"Joint attention, in forward order: {', then '.join(f'`{p}`' for p in paths)}.",
    ]
    lines += [f"Tokens of one call, in order: {', '.join(family.order)}.", "", "## Words", ""]
    lines += [stream_line(stream) for stream in family.streams]
    if not family.streams:
        lines.append("Its pipeline's text is not followed: words are unknown unless `probe(tokens=...)` is told.")
    if family.template_arguments:
        names = ", ".join(f"`{name}`" for name in family.template_arguments)
        lines += ["", f"With other values of {names} than the pipeline's own, words are unknown."]
    lines += ["", "## What was tried", "", "Masses against a float64 softmax, on tiny random models."]
    lines += ["", "| way of running | outcome |", "|-|-|", *(f"| {way} | {outcome} |" for way, outcome in rows)]
    return "\n".join(lines) + "\n"


def index_page() -> str:
    """The list of all families."""
    lines = ["# Families", "", INTRODUCTION, "| family | transformer | `--model` takes |", "|-|-|-|"]
    for family in FAMILIES.values():
        taken = ", ".join(family.pipelines) or "give the pipeline to `probe`"
        lines.append(f"| [{family.name}]({family.name}.md) | {family.transformer} | {taken} |")
    return "\n".join(lines) + "\n"
