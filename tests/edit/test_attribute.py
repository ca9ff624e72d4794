"""Attributions on a function whose answer is known, the agreement on planted tables, and the whole on a tiny model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.edit.attribute import agreement, attribute, attributions
from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes import scene
from tests import tiny


@pytest.mark.parametrize("method", ["ablation", "gradients"])
def test_linear_functions_have_one_answer(method: Any) -> None:
    weights = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    text, empty = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(1))
    spans = [[1, 2], [4]]

    def gain(texts: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btc,rtc->br", texts, weights)

    found = attributions(gain, text, empty, spans, 2, method, 8)
    expected = [[float(((text - empty)[0, span] * weights[r, span]).sum()) for r in range(2)] for span in spans]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def planted(link: float, scenes: int = 20) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for item in range(scenes):
        causal = np.eye(3) + 0.1 * rng.normal(size=(3, 3))
        seen = link * causal + (1 - link) * rng.normal(size=(3, 3))
        for w in range(3):
            for r in range(3):
                rows.append({"item": item, "word": str(w), "region": str(r), "layer": 0, "attribution": causal[w, r],
                             "attention": seen[w, r]})  # fmt: skip
    return pd.DataFrame(rows)


def test_agreement_and_its_control() -> None:
    row = agreement(planted(1.0), draws=100).iloc[0]
    assert row["rho"] == pytest.approx(1)
    assert row["control"] < 0 and row["verdict"] == "beyond control"
    row = agreement(planted(0.0), draws=100).iloc[0]
    assert abs(row["rho"]) < 0.3 and row["verdict"] == "as control"


def test_every_word_region_and_layer_of_a_scene() -> None:
    # The tiny tokenizers read few tokens: a scene of two classes with short names.
    items = [s for s in (scene("val", k) for k in range(60)) if len(s.class_names) == 2][:1]
    model = MMDiT(tiny.pipeline())
    names = items[0].class_names
    try:
        table = attribute(model, items, sigma=0.6)
    except UserError as error:
        pytest.skip(f"the tiny tokenizer cuts these words: {error}")
    assert len(table) == len(names) ** 2 * tiny.LAYERS
    assert (table["attribution"] != 0).all()
    assert table["attention"].between(0, 1).all()
    again = attribute(model, [dataclasses.replace(items[0])], sigma=0.6)
    np.testing.assert_allclose(table["attribution"], again["attribution"])


def test_bad_requests() -> None:
    model = MMDiT(tiny.pipeline())
    with pytest.raises(UserError, match="ablation"):
        attribute(model, [], method="ablations")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="above 0"):
        attribute(model, [], sigma=0.0)
    with pytest.raises(UserError, match="two classes"):
        attribute(model, [])
