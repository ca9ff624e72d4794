"""Explore: one self-contained page of a picture's words in every layer, head and step, and what each layer attends to.

    result = Explore(prompt="a red ring on grass").run("scenes-sd3")
    result.experiment.pages(result)[0].save("explore.html")

All layers are seen as the mean over heads; single heads, in the layers that fit into a page, chosen ones first
(`pages.explorer.plan`); sampling steps are evenly spaced. Not here: the page itself (`pages.explorer`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from mmdit_probe.errors import counted
from mmdit_probe.experiments.attention_budget import FRAMES
from mmdit_probe.experiments.experiment import Study
from mmdit_probe.experiments.options import streams_of
from mmdit_probe.experiments.pictured_words import PicturedPrompt, Pictures, grounding
from mmdit_probe.options import Option
from mmdit_probe.results.clip import Clip
from mmdit_probe.specs import Spec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from mmdit_probe.experiments.result import Result
    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.experiments.text import Text
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.models.tokens import TokenTable
    from mmdit_probe.observe.maps import TextMaps
    from mmdit_probe.observe.observer import LayerCall
    from mmdit_probe.pages import Exploration, Page

SHOWN_LAYERS, SHOWN_WORDS = 12, 8
"""Most rows and columns of the figure."""
QUERIES = ("image", "text", "reference")
"""Kinds of query in a budget; the last one of editing models."""
SPECIAL = ("bos", "eos", "template", "pad")
"""Kinds of text token that are shown beside words."""


@dataclass(frozen=True, kw_only=True)
class Explore(Pictures):
    """One HTML page to explore where words look and are looked for: no server, no network."""

    name = "explore"
    examples = ('"a red ring and a blue house on grass"',)
    tables = ("budget",)

    layers: Annotated[
        Spec | None,
        Option(
            "Layers whose single heads come first where not all fit; all layers are shown.",
            shown_default="those known to ground words, else the middle third",
        ),
    ] = None

    def places(self, model: MMDiT) -> dict[str, Any]:
        return {"chosen": list(grounding(model, self.layers).layers)}

    def measure(self, study: Study, task: PicturedPrompt, record: TaskRecord) -> None:
        from mmdit_probe.observe.maps import TextMaps
        from mmdit_probe.observe.mass import AttentionMass
        from mmdit_probe.observe.probe import probe
        from mmdit_probe.pages.explorer import STEPS, coarser, plan

        model, chosen = study.model, study.request["chosen"]
        table = model.token_tables([task.prompt])[0]
        streams = streams_of(self.streams)
        special = [pair for pair in special_spans(table) if streams is None or pair[1] in streams]
        words: list[str | int | tuple[str, str]] = [*task.words, *special]
        layers = range(len(model.layers))
        grid = model.token_grid(*self.size(model))
        total = 1 if task.picture else self.num_steps
        fits = plan(len(words), len(layers), model.heads, grid, 0 if total == 1 else total, len(layers))
        # A page that holds no single step still shows a mean over several.
        steps = sorted({round(at) for at in np.linspace(0, total - 1, min(total, fits.steps or STEPS))})
        first = [*chosen, *(layer for layer in layers if layer not in chosen)]
        apart = sorted(first[: fits.layers])
        i2t, t2i = TextMaps(words, streams=streams), textual(words, streams)
        heads = [TextMaps(words, "all", streams=streams), textual(words, streams, "all")] if apart else []
        mass = AttentionMass()
        with probe(model, *heads, layers=apart or "all", steps=steps):
            image = self.look(model, task, [i2t, t2i, mass], "all", "all" if task.picture else steps)
        shown = [] if fits.steps == 0 else steps
        kinds, budget = budgets(mass.table(), layers, model.heads, shown)
        record.arrays(
            f"explore-{task.index:03d}",
            names=np.array([*task.words, *(f"{kind.upper()} ({stream})" for kind, stream in special)]),
            special=np.array(len(special)),
            steps=np.array(
                ["mean" if shown else "the one", *(f"{s} (sigma {i2t.samples(0, s)[0][2]:.2f})" for s in shown)]
            ),
            mean_of=np.array(steps),
            coarse=np.array(fits.coarse),
            i2t=coarser(np.stack([_rows(i2t, layer, shown) for layer in layers]), fits.coarse),
            t2i=coarser(np.stack([_rows(t2i, layer, [])[0] for layer in layers]), fits.coarse),
            apart=np.array(apart, int),
            **{
                name: coarser(np.stack([_of_heads(one, layer) for layer in apart]), fits.coarse)
                for name, one in zip(("i2t_heads", "t2i_heads"), heads, strict=False)
            },
            kinds=np.array(kinds),
            budget=budget,
        )
        record.picture(f"{task.index:03d}", image)
        record.write("budget", long(budget, kinds, layers), item=task.index, prompt=task.prompt, seed=task.seed)

    def explorations(self, result: Result) -> list[Exploration]:
        """What the pages show: the prompts that have one of the words."""
        return [self._exploration(result, k) for k in _shown(result)]

    def pages(self, result: Result) -> list[Page]:
        """A page per picture."""
        from mmdit_probe.pages import explorer

        return [explorer(one) for one in self.explorations(result)]

    def _exploration(self, result: Result, number: int) -> Exploration:
        from mmdit_probe.data.words import folded, words as places
        from mmdit_probe.pages import Exploration

        prompt, seed = result.request["items"][number][:2]
        kept = result.store.load_arrays(f"explore-{number:03d}")
        names = [str(name) for name in kept["names"]]
        count = len(names) - int(kept["special"])
        known = {folded(name)[0]: k for k, name in enumerate(names[:count])}
        tokens = [(prompt[a:b], known.get(folded(prompt[a:b])[0], -1)) for a, b in places(prompt)]
        here = {k for _, k in tokens}
        tokens += [(name, k) for k, name in enumerate(names) if k not in here]
        apart = [int(layer) for layer in kept["apart"]]
        picture = result.store.load_picture(f"{number:03d}")
        # A page shows one picture for each of the model's frames.
        frames = kept["i2t"].shape[3] if kept["i2t"].ndim == 6 else 1
        shown = picture.keyframes(frames) if isinstance(picture, Clip) else picture.convert("RGB")
        return Exploration(
            f"{result.model_name}: {prompt}", prompt, shown, names,
            tokens, range(len(kept["i2t"])), [str(step) for step in kept["steps"]], kept["i2t"], kept["t2i"],
            {layer: (kept["i2t_heads"][k], kept["t2i_heads"][k]) for k, layer in enumerate(apart)},
            [str(kind) for kind in kept["kinds"]], kept["budget"], result.request["chosen"],
            frozenset(range(count, len(names))), self._about(result, kept, seed), QUERIES[: kept["budget"].shape[3]],
        )  # fmt: skip

    def _about(self, result: Result, kept: dict[str, Any], seed: int) -> str:
        model = result.data["model"]
        said = f"{model['layers']} layers x {model['heads']} heads, {model['dtype']}; seed {seed}"
        if self.images is not None:
            said += f"; a photo at sigma {self.sigma:g}"
        else:
            mean = ", ".join(str(int(step)) for step in kept["mean_of"])
            said += f"; {counted(self.num_steps, 'step')}, guidance {self.guidance:g}; the mean is over steps {mean}"
        coarse = int(kept["coarse"])
        return f"{said}; {coarse} x {coarse} tokens averaged into one" if coarse > 1 else said

    def files(self, result: Result, folder: Path) -> None:
        for name, page in zip(self._names(result), self.pages(result), strict=True):
            page.save(folder / name)

    def _names(self, result: Result) -> list[str]:
        several = len(result.request["items"]) > 1
        return [f"explore-{k:03d}.html" if several else "explore.html" for k in _shown(result)]

    def draw(self, result: Result) -> dict[str, Figure]:
        from mmdit_probe.plots.sheet import sheet

        one = self._exploration(result, _shown(result)[0])
        layers = sorted({round(at) for at in np.linspace(0, len(one.layers) - 1, SHOWN_LAYERS)})
        maps = one.i2t[:, 0, :SHOWN_WORDS]
        maps = maps[:, :, maps.shape[2] // 2] if maps.ndim == 5 else maps  # of a video the middle frame
        cells = [list(maps[layer]) for layer in layers]
        rows = [f"layer {layer}" for layer in layers]
        return {"explore": sheet(cells, one.words[:SHOWN_WORDS], rows, title=f"{one.title}, I2T", note=one.about)}

    def tell(self, result: Result) -> list[Text]:
        files = [result.path / name for name in self._names(result)] if result.path is not None else []
        where = ", ".join(map(str, files)) if files else "result.experiment.pages(result)[0].save(...)"
        return [f"open in a browser: {where}"]

    def document(self, result: Result) -> dict[str, Any]:
        path = result.path
        return {"pages": [] if path is None else [path / name for name in self._names(result)]}


def _shown(result: Result) -> list[int]:
    """Numbers of the items that have words."""
    return [k for k, (_, _, words, *_) in enumerate(result.request["items"]) if words]


def textual(words: Sequence[Any], streams: Collection[str] | None, heads: Literal["mean", "all"] = "mean") -> TextMaps:
    """An observer of T2I maps, which are 0 in models where text tokens are no queries."""
    from mmdit_probe.observe.maps import TextMaps

    class OrNothing(TextMaps):
        def measure(self, seen: LayerCall) -> Tensor:
            queries = seen.layout.queries
            if queries is None or queries[:, seen.layout.positions("text")].any():
                return super().measure(seen)
            heads = [seen.call.query.shape[1]] * (self.heads == "all")
            return seen.call.query.new_zeros(len(seen.tokens), *heads, *seen.space, len(words))

    return OrNothing(words, heads, "text", streams)


def special_spans(table: TokenTable) -> list[tuple[str, str]]:
    """The kinds of span beside words that a prompt has, with their streams."""
    pairs = dict.fromkeys((token.kind, token.stream) for token in table.tokens)
    return sorted((pair for pair in pairs if pair[0] in SPECIAL), key=lambda pair: SPECIAL.index(pair[0]))


def budgets(table: pd.DataFrame, layers: range, heads: int, steps: list[int]) -> tuple[list[str], np.ndarray]:
    """Kinds of key, and the shares [L, 1 + H, 1 + S, Q, K] of image, text and, where there are any, reference queries:
    means over heads and steps first.

    Args:
        table: of `AttentionMass`, per head. steps: those that have a row of their own.
    """
    own = table[table["branch"] == "cond"] if (table["branch"] == "cond").any() else table
    kind, key = own["span"].astype(str), own["key"].astype(str)
    kind = kind.where((kind != "all") & (key != "reference"), key)
    cell = ["layer", "head", "step", "query"]
    sums = own.assign(kind=kind).groupby([*cell, "kind"], observed=True)["mass"].sum().unstack("kind").fillna(0.0)
    order = ["word", "bos", "eos", "template", "pad", "vision", "null", "unknown"]
    order += ["image", *FRAMES.values(), "reference", "other"]
    kinds = [name for name in order if name in sums and sums[name].any()]
    rows = sums[kinds].reset_index()
    queries = QUERIES if (rows["query"] == "reference").any() else QUERIES[:2]
    found = np.zeros((len(layers), 1 + heads, 1 + len(steps), len(queries), len(kinds)), np.float32)
    for place, query in enumerate(queries):
        of = rows[rows["query"] == query]
        parts = [of, *(of[of["step"] == step] for step in steps)]
        for row, part in enumerate(parts):
            means = part.groupby(["layer", "head"], observed=True)[kinds].mean()
            if len(means):
                found[:, 1:, row, place] = means.to_numpy().reshape(len(layers), heads, len(kinds))
    found[:, 0] = found[:, 1:].mean(1)
    return kinds, found


def long(budget: np.ndarray, kinds: list[str], layers: range) -> dict[str, Any]:
    """The budget's mean over heads and steps as columns."""
    names = [f"{query} -> {kind}" for query in QUERIES[: budget.shape[3]] for kind in kinds]
    values = budget[:, 0, 0].reshape(len(layers), -1)
    return {"layer": np.array(layers, np.int16), **{name: values[:, k] for k, name in enumerate(names)}}


def _rows(maps: TextMaps, layer: int, steps: list[int]) -> np.ndarray:
    """[1 + S, G, h, w], of a video [1 + S, G, F, h, w]: the mean over all kept steps, then single ones."""
    parts = [maps.maps(layer), *(maps.maps(layer, step) for step in steps)]
    return np.stack([part[0].movedim(-1, 0).numpy() for part in parts])


def _of_heads(maps: TextMaps, layer: int) -> np.ndarray:
    """[H, G, h, w], of a video [H, G, F, h, w], the mean over steps."""
    return maps.maps(layer)[0].movedim(-1, 1).numpy()
