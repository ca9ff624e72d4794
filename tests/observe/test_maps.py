"""TextMaps against the columns and rows of the explicit softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdit_probe import MMDiT, TextMaps, load, probe
from mmdit_probe.attention import exact
from mmdit_probe.errors import UserError
from tests import tiny
from tests.observe.oracle import attentions

IMAGE, TEXT = 16, tiny.CLIP_LENGTH + tiny.T5_LENGTH


@pytest.fixture
def model(tiny_directory: Path) -> MMDiT:
    return load(tiny_directory, device="cpu")


def latents(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(2))


PROMPTS = ["a red ring", "a cat and a ring"]


def dense(model: MMDiT, layer: int = 1) -> Tensor:
    text = model.encode_prompt(PROMPTS)
    return attentions(lambda: model.denoise(latents(), 0.5, text), IMAGE + TEXT)[layer]


def maps(model: MMDiT, **options: Any) -> Tensor:
    with probe(model, TextMaps(**options), layers=1) as run:
        model.denoise(latents(), 0.5, model.encode_prompt(PROMPTS))
    return run[TextMaps].maps(1)


def test_all_positions_are_the_text_columns(model: MMDiT) -> None:
    expected = dense(model)[:, :, :IMAGE, IMAGE:]
    per_head = maps(model, heads="all")
    assert per_head.shape == (2, tiny.HEADS, 4, 4, TEXT)
    assert (per_head.flatten(2, 3) - expected).abs().max() < 2e-6
    assert (maps(model).flatten(1, 2) - expected.mean(1)).abs().max() < 2e-6


def test_words_sum_their_positions_and_differ_by_row(model: MMDiT) -> None:
    found = maps(model, words=["ring", "a"])
    attention = dense(model).mean(1)
    for row, table in enumerate(model.token_tables(PROMPTS)):
        for place, word in enumerate(["ring", "a"]):
            keys = [IMAGE + p for p in table.positions(word=word)]
            assert (found[row, ..., place].flatten() - attention[row, :IMAGE][:, keys].sum(-1)).abs().max() < 2e-6
    only = maps(model, words=["ring"], streams="t5")
    assert (only[..., 0] < found[..., 0]).all()


def test_streams_that_do_not_read_a_word_are_refused(model: MMDiT) -> None:
    with pytest.raises(UserError, match=r"'ring' is read by clip, t5; .* found \('llm',\)"):
        maps(model, words=["ring"], streams="llm")


def test_positions_can_be_named(model: MMDiT) -> None:
    assert torch.equal(maps(model, words=[3, 14]), maps(model)[..., [3, 14]])
    with pytest.raises(UserError, match=r"positions in 0\.\.21"):
        maps(model, words=[22])


def test_text_queries_give_the_transposed_block(model: MMDiT) -> None:
    attention = dense(model).mean(1)
    found = maps(model, queries="text")
    assert (found.flatten(1, 2) - attention[:, IMAGE:, :IMAGE].transpose(1, 2)).abs().max() < 2e-6
    ring = maps(model, words=["ring"], queries="text")
    for row, table in enumerate(model.token_tables(PROMPTS)):
        rows = [IMAGE + p for p in table.positions(word="ring")]
        assert (ring[row].flatten() - attention[row][rows, :IMAGE].mean(0)).abs().max() < 2e-6


@pytest.mark.parametrize("heads", ["mean", "all"])
def test_without_a_logsumexp_the_maps_are_the_same(model: MMDiT, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = maps(model, heads=heads)
    monkeypatch.setattr(exact, "attend", lambda call: (call.stock(), None))
    assert torch.allclose(maps(model, heads=heads), expected, atol=1e-6)


def test_a_grid_that_is_not_square_keeps_its_sides(model: MMDiT) -> None:
    text = model.encode_prompt(PROMPTS)
    with probe(model, TextMaps(words=["ring"]), layers=1) as run:
        model.denoise(latents(8, 4), 0.5, text)
    found = run[TextMaps].maps(1)
    assert found.shape == (2, 4, 2, 1)
    attention = attentions(lambda: model.denoise(latents(8, 4), 0.5, text), 8 + TEXT)[1].mean(1)
    keys = [8 + p for p in text.tokens[0].positions(word="ring")]
    assert (found[0, ..., 0] - attention[0, :8][:, keys].sum(-1).view(4, 2)).abs().max() < 2e-6


def test_steps_average_and_rows_are_kept_in_order(model: MMDiT) -> None:
    with probe(model, TextMaps(words=["ring"]), layers="0-1") as run:
        model.generate("a red ring", steps=2, seed=3, guidance=2.0, output_type="latent")
        model.generate("a ring", steps=2, seed=8, guidance=2.0, output_type="latent")
    observer = run[TextMaps]
    assert observer.steps == [0, 1]
    each = torch.stack([observer.maps(1, step=step) for step in (0, 1)])
    assert each.shape == (2, 2, 4, 4, 1)
    assert torch.allclose(observer.maps(1), each.mean(0))
    assert [(prompt, seed) for prompt, seed, _ in observer.samples(1)] == [("a red ring", 3), ("a ring", 8)]
    assert observer.samples(1, step=1)[0][2] == pytest.approx(model.sigmas(2)[1])


def test_runs_of_other_numbers_of_steps_are_not_averaged_into_one(model: MMDiT) -> None:
    """At step 2 the only sample is the second run's: it stood for the first one in the mean over steps."""
    with probe(model, TextMaps(words=["ring"]), layers=1) as run:
        for seed, prompt in ((3, "a red ring"), (8, "a ring")):
            model.generate(prompt, steps=2 + (seed > 3), seed=seed, guidance=1.0, output_type="latent")
    for read in (run[TextMaps].maps, lambda layer: run[TextMaps].map("ring", layers=layer)):
        with pytest.raises(UserError, match="steps 0 and 2 hold different samples"):
            read(1)
    with probe(model, TextMaps(words=["ring"]), layers=1) as alone:
        model.generate("a red ring", steps=2, seed=3, guidance=1.0, output_type="latent")
    found = run[TextMaps].map("ring", steps="0-1")
    np.testing.assert_array_equal(found, alone[TextMaps].map("ring"))


def test_what_was_not_kept_is_named(model: MMDiT) -> None:
    with probe(model, TextMaps(), layers=1) as run:
        model.denoise(latents(), 0.5, model.encode_prompt(PROMPTS))
    with pytest.raises(UserError, match="kept: layer 1 step 0"):
        run[TextMaps].maps(2)
    with pytest.raises(UserError, match="branch uncond"):
        run[TextMaps].maps(1, branch="uncond")
    with probe(model, TextMaps(words=["red", "cat"]), layers=1) as run:
        model.denoise(latents(), 0.5, model.encode_prompt(PROMPTS))
    for sample, word in enumerate(["cat", "red"]):
        with pytest.raises(UserError, match=rf"sample {sample}, '{PROMPTS[sample]}', has no .*'{word}'"):
            run[TextMaps].map(word, sample=sample)
    with pytest.raises(UserError, match="unknown word 'dog'"):
        maps(model, words=["dog"])
    with pytest.raises(UserError, match="unknown queries option"):
        TextMaps(queries="pixels")  # type: ignore[arg-type]
