"""A small attention-mass table whose right answers are known in closed form; which columns the docs explain."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pandas as pd

from mmdit_probe.experiments.result import Result
from mmdit_probe.experiments.token_rows import TokenRows

SPANS = {
    ("clip", "bos"): 1,
    ("clip", "word"): 3,
    ("clip", "eos"): 1,
    ("clip", "pad"): 3,
    ("t5", "word"): 4,
    ("t5", "pad"): 4,
}
"""(stream, span kind) -> number of tokens; 16 text tokens in all."""

IMAGE = 48
BRANCHES = ("uncond", "cond")


def budget_table(layers: int = 6, prompts: int = 3, steps: int = 2, heads: int = 2) -> pd.DataFrame:
    """Image queries of layer l give (l + 1) / 10 to text, text queries half to image; spread evenly over text tokens.

    Head h and step s shift I2T by +-0.02 and +-0.01 (their means are 0), prompt p by 0.01 p; the unconditional branch
    gives nothing to text.
    """
    text = sum(SPANS.values())
    total = IMAGE + text
    rows = []
    for p, step, branch, layer, head in product(range(prompts), range(steps), BRANCHES, range(layers), range(heads)):
        shift = 0.02 * (2 * head - heads + 1) + 0.01 * (2 * step - steps + 1) + 0.01 * p
        to_text = {"image": (layer + 1) / 10 + shift if branch == "cond" else 0.0, "text": 0.5}
        call = {"item": p, "prompt": f"prompt {p}", "seed": p, "step": step, "sigma": 1.0 - 0.1 * step}
        for query, n_query in (("image", IMAGE), ("text", text)):
            cell = {**call, "branch": branch, "layer": layer, "head": head, "query": query, "n_query": n_query}
            image = {"key": "image", "span": "all", "stream": "", "mass": 1 - to_text[query]}
            rows.append({**cell, **image, "n_key": IMAGE, "uniform": IMAGE / total})
            for (stream, span), n_key in SPANS.items():
                words = {"key": "text", "span": span, "stream": stream, "mass": to_text[query] * n_key / text}
                rows.append({**cell, **words, "n_key": n_key, "uniform": n_key / total})
    return pd.DataFrame(rows)


def of_video(table: pd.DataFrame) -> pd.DataFrame:
    """The same of a video of four frames: a third of I2I stays in the query's own frame."""
    inside = (table["query"] == "image") & (table["key"] == "image")
    parts = [
        table[inside].assign(
            span=span, mass=mass * table["mass"], n_key=n * IMAGE // 4, uniform=n / 4 * table["uniform"]
        )
        for span, mass, n in (("same frame", 1 / 3, 1), ("other frames", 2 / 3, 3))
    ]
    return pd.concat([*parts, table[~inside]], ignore_index=True)


def by_item(ask: TokenRows, table: pd.DataFrame) -> pd.DataFrame:
    """What an experiment keeps of every item, from its long table: each denoising call is reduced, then joined."""
    parts = []
    for item, rows in table.groupby("item"):
        parts.append(ask.reduce(rows).assign(item=item, control="none"))
    return pd.concat(parts, ignore_index=True)


def unexplained(result: Result) -> set[str]:
    """Columns of a result's tables and summaries that the page on tables does not name."""
    page = (Path(__file__).parents[1] / "docs" / "guide" / "tables.md").read_text(encoding="utf-8")
    told = [re.sub(r"<\w+>", ".+", re.escape(name)) for name in re.findall(r"`([^`\n]+)`", page)]
    known = re.compile(rf"(?:{'|'.join(told)})(?:_low|_high|_uniform)?")
    held = [result.store.table(name) for name in result.experiment.tables if result.store.has(name)]
    columns = {str(name) for frame in (*held, *result.frames.values(), result.claims) for name in frame.columns}
    return {name for name in columns if not known.fullmatch(name)}
