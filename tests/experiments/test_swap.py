"""The swap test: which prompts fit, words that differ within a batch, what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe import UserError, load
from mmdit_probe.edit import Swap
from mmdit_probe.experiments import SwapTest
from mmdit_probe.experiments.swap_test import Exchange, against, summarise, swap_table, swapped_words
from mmdit_probe.experiments.text import TextTable
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes import scene
from tests import tiny
from tests.tables import unexplained


def test_prompts_that_fit() -> None:
    text = "a red ring and a blue house on grass"
    assert swapped_words(text, "colours") == ("red", "blue") and swapped_words(text, "nouns") == ("ring", "house")
    for other in (
        "a red ring and a red house on grass", "two red rings and a blue house on grass", "a red ring and a blue house",
        "a red ring left of a blue house on grass", "a photo of a cat", "ring grass",
    ):  # fmt: skip
        assert swapped_words(other, "colours") == (), other


def test_words_may_differ_between_prompts(pipe: Any) -> None:
    """In one batch each prompt has its own pair exchanged; one that is not named keeps its stock image."""
    from mmdit_probe import probe

    model = MMDiT(pipe)
    prompts, pairs = ["a red ring", "a cat and", "a blue"], {"a red ring": ("red", "ring"), "a cat and": ("cat", "and")}

    def latents(texts: list[str], seeds: list[int], *edits: Swap) -> torch.Tensor:
        options = {"steps": 2, "guidance": 3.0, "seed": seeds, "output_type": "latent"}
        if not edits:
            return model.generate(texts, **options)
        with probe(model, edits=edits):
            return model.generate(texts, **options)

    mixed = latents(prompts, [0, 1, 2], Swap(words=pairs, layers=[1]))
    stock = latents(prompts, [0, 1, 2])
    for place, text in enumerate(prompts[:2]):
        alone = latents([text], [place], Swap(words=pairs[text], layers=[1]))
        torch.testing.assert_close(mixed[place], alone[0], atol=1e-4, rtol=1e-4)
        assert (mixed[place] - stock[place]).abs().max() > 1e-3
    torch.testing.assert_close(mixed[2], stock[2], atol=1e-5, rtol=0)


def test_the_parser_tells_exchanged_from_kept() -> None:
    item = next(
        s for s in (scene("val", k) for k in range(400))
        if len(s.objects) == 2 and len({o.noun for o in s.objects}) == 2 and len({o.colour for o in s.objects}) == 2
    )  # fmt: skip
    one, two = item.objects
    own = f"a {one.colour} {one.noun} and a {two.colour} {two.noun} on {item.grounds[0]}"
    other = f"a {two.colour} {one.noun} and a {one.colour} {two.noun} on {item.grounds[0]}"
    from PIL import Image

    picture = Image.fromarray(item.image)
    found = Exchange()([own, other], [picture, picture], [picture, picture])
    assert found["kept"].tolist() == [1.0, 0.0] and found["exchanged"].tolist() == [0.0, 1.0]


def test_shares_and_controls_are_paired() -> None:
    rows = []
    for item in range(10):
        for condition, layer, hit in (("stock", -1, 0), ("swap", 0, item < 8), ("function", 0, item < 1)):
            rows.append({"item": item, "control": "none", "condition": condition, "layer": layer, "change": 0.1,
                         "exchanged": float(hit), "kept": 1.0 - hit})  # fmt: skip
    table = pd.DataFrame(rows)
    row = summarise(table).set_index(["condition", "layer", "outcome"]).loc[("swap", 0, "exchanged")]
    assert row["share"] == 0.8 and row["difference"] == pytest.approx(0.8)
    assert 0 <= row["low"] < 0.8 < row["high"] <= 1
    stock, swapped = swap_table(summarise(table)).rows
    assert [cell[:6] for cell in stock] == ["stock", "0.000 ", "", "", "1.000 "]
    assert [cell[:6] for cell in swapped] == ["0", "0.800 ", "+0.800", "0.100 ", "0.200 "]
    values = against(table).query("outcome == 'exchanged' and layer == 0").groupby("control")["value"].mean()
    assert values.to_dict() == {"none": 0.8, "stock": 0.0, "function": 0.1}


def test_run_on_the_embedded_model() -> None:
    ask = SwapTest(limit=2, layers="4", num_steps=2, batch=2, together=True)
    result = ask.run(load("scenes-sd3"), progress=False)
    assert unexplained(result) == set()
    assert len(result.table) == 2 * (1 + 2 * 2)
    assert set(result.summary["condition"]) == {"stock", "swap", "function"}
    assert (result.table.query("condition == 'swap'")["change"] > 0).all()
    assert set(result.claims["control"]) == {"stock", "function"} and result.figure().axes
    assert np.isin(result.table[["exchanged", "kept"]], (0, 1)).all()
    claims = result.texts()[-3]
    assert isinstance(claims, TextTable) and {row[0] for row in claims.rows} == {"4", "all"}  # "all" was -1
    with pytest.raises(UserError, match="none of 1 prompt has"):
        SwapTest(prompts=["a red ring"]).gather(True)
    with pytest.raises(UserError, match="scenes parser"):
        SwapTest().run(MMDiT(tiny.pipeline()), progress=False)
    with pytest.raises(UserError, match="its own"):
        SwapTest(control="budget")
