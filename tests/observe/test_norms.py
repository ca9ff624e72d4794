"""ValueNorm against the values themselves, LoRA included, and the summaries against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmdit_probe import ValueNorm, probe
from mmdit_probe.experiments import ValueNorms, value_norms
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.tokens import token_tables
from mmdit_probe.observe.norms import COLUMNS, value_norms as norms_of
from mmdit_probe.results.statistics import interval
from mmdit_probe.specs import ALL_HEADS
from tests import tiny
from tests.tables import by_item

IMAGE = 16
N = IMAGE + tiny.CLIP_LENGTH + tiny.T5_LENGTH
PROMPT = "a red ring"


def sample(pipe: Any, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"} | options
    return pipe(
        PROMPT, max_sequence_length=tiny.T5_LENGTH, generator=torch.Generator().manual_seed(1), **options
    ).images


def values_written_down(run: Any) -> list[torch.Tensor]:
    """The value of every joint attention call, [B, H, N, D] float64, by replacing torch's function."""
    stock, seen = torch.nn.functional.scaled_dot_product_attention, []

    def recording(query: Any, key: Any, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if value.shape[-2] == N and value.shape[1] > 1:
            seen.append(value.detach().double().clone())
        return stock(query, key, value, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = recording
    try:
        run()
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
    return seen


@pytest.mark.parametrize("variant", ["sd3", "sd35", "no-t5"])
def test_every_row_is_the_norm_of_the_values(variant: str) -> None:
    pipe = tiny.pipeline(variant)
    seen = values_written_down(lambda: sample(pipe))
    with probe(pipe, ValueNorm()) as run:
        sample(pipe)
    table = run[ValueNorm].table()
    assert list(table.columns) == list(COLUMNS)
    tables = {
        "cond": token_tables(pipe, FAMILIES["sd3"], [PROMPT], tiny.T5_LENGTH)[0],
        "uncond": token_tables(pipe, FAMILIES["sd3"], [""], tiny.T5_LENGTH)[0],
    }
    for row in table.itertuples():
        value = seen[row.step * tiny.LAYERS + row.layer][("uncond", "cond").index(row.branch)]  # [H, N, D]
        keys = (
            list(range(IMAGE))
            if row.token == "image"
            else [IMAGE + p for p in tables[row.branch].positions(kind=row.span, stream=row.stream)]
        )
        chosen = value[:, keys].transpose(0, 1).flatten(1) if row.head == ALL_HEADS else value[row.head, keys]
        assert row.norm == pytest.approx(chosen.norm(dim=-1).mean().item(), rel=1e-5), row
        assert row.spread == pytest.approx(chosen.norm(dim=-1).std(correction=0).item(), rel=1e-4, abs=1e-6)
        assert row.n_token == len(keys)
    assert set(table["head"]) == {ALL_HEADS, *range(tiny.HEADS)}
    assert set(table["branch"]) == {"cond", "uncond"}


def test_lora_added_later_is_counted(pipe: Any) -> None:
    from peft import LoraConfig

    with probe(pipe, ValueNorm(heads=0)) as run:
        sample(pipe)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
        sample(pipe)
    table = run[ValueNorm].table()
    rows = table[(table["token"] == "image") & (table["head"] == ALL_HEADS) & (table["layer"] == 0)]
    before, after = np.split(rows["norm"].to_numpy(), 2)
    assert (np.abs(before - after) > 1e-3).all()


def test_observing_leaves_the_image_bitwise_equal(pipe: Any) -> None:
    stock = sample(pipe)
    with probe(pipe, ValueNorm()):
        assert torch.equal(sample(pipe), stock)


def test_heads_add_up_in_squares() -> None:
    value = torch.randn(2, 3, 5, 4)
    norms = norms_of(value)
    assert norms.shape == (2, 4, 5)
    assert torch.allclose(norms[:, 0].square(), norms[:, 1:].square().sum(1), rtol=1e-5)
    assert torch.allclose(norms_of(3 * value), 3 * norms, rtol=1e-5)


def test_summary_weighs_tokens_and_leaves_padding_out_of_the_prompt() -> None:
    import pandas as pd

    rows = []
    for item, shift in enumerate((0.0, 2.0)):
        for span, norm, n in (("all", 1.0, 16), ("bos", 4.0, 1), ("word", 8.0, 3), ("pad", 100.0, 4)):
            token = "image" if span == "all" else "text"
            for head in (ALL_HEADS, 0):
                rows.append(
                    {"item": item, "step": 0, "branch": "cond", "layer": 0, "head": head,
                     "token": token, "span": span, "norm": norm + shift, "n_token": n}
                )  # fmt: skip
    table = by_item(ValueNorms(), pd.DataFrame(rows))
    row = value_norms.by_layer(table).iloc[0]
    assert (row["prompts"], row["image"], row["word"], row["pad"]) == (2, 2.0, 9.0, 101.0)
    assert row["prompt"] == pytest.approx((4 + 3 * 8) / 4 + 1)
    assert row["text"] == pytest.approx((4 + 3 * 8 + 4 * 100) / 8 + 1)
    assert row["gap"] == pytest.approx(row["prompt"] - row["image"])
    assert (row["image_low"], row["image_high"]) == pytest.approx(interval([1.0, 3.0])[1:])
    assert row["gap_high"] == pytest.approx(row["gap"])
    assert value_norms.by_head(table)["word"].tolist() == [9.0]
