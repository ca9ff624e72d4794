"""Attributions on a function whose answer is known, the agreement on planted tables, and the whole on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.cli.app import main
from mmdit_probe.errors import UserError
from mmdit_probe.experiments.word_attribution import agreement, attribute, attributions
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes import scene
from mmdit_probe.scenes.world import CLASSES
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


def planted(link: float, seed: int = 0, scenes: int = 20) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
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
    row = agreement(planted(1.0)).iloc[0]
    assert row["rho"] == pytest.approx(1)
    assert row["control"] < 0 and row["verdict"] == "beyond control"
    unrelated = [agreement(planted(0.0, seed)).iloc[0] for seed in range(8)]
    assert max(abs(row["rho"]) for row in unrelated) < 0.3
    assert sum(row["verdict"] == "not beyond control" for row in unrelated) >= 7  # 95 % intervals


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


def test_the_mass_target_is_the_change_of_the_words_own_map() -> None:
    """Ablation by hand: the prompt with one word's embeddings replaced, seen by the observer of maps."""
    from mmdit_probe import TextMaps, load, probe
    from mmdit_probe.models.mmdit import TextCondition

    model = load("scenes-sd3")
    item = next(s for s in (scene("val", k) for k in range(60)) if len(s.class_names) == 2)
    table = attribute(model, [item], target="mass", sigma=0.7, seed=3, layers=[4])
    assert len(table) == 4 and (table["attribution"] < table["attention"] + 1e-6).all()
    text, empty = model.encode_prompt(" ".join(item.class_names)), model.encode_prompt("")
    word = item.class_names[0]
    span = [p for places in text.tokens[0].word_spans(word).values() for p in places]
    ablated = text.prompt_embeds.clone()
    ablated[:, span] = empty.prompt_embeds[:, span]
    noised = model.noise(model.encode_image(item.image), 0.7, 3)
    means = []
    for embeddings in (text.prompt_embeds, ablated):
        with probe(model, TextMaps(), layers=[4]) as run:
            model.denoise(noised, 0.7, TextCondition(embeddings, text.pooled, text.tokens))
        own = run[TextMaps].maps(4)[0][..., span].sum(-1)
        masks = torch.from_numpy(item.classes == CLASSES.index(word)).float()[None, None]
        area = torch.nn.functional.adaptive_avg_pool2d(masks, own.shape)[0, 0]
        means.append(float((own * area).sum() / area.sum()))
    row = table[(table["word"] == word) & (table["region"] == word)].iloc[0]
    assert row["attention"] == pytest.approx(means[0], rel=1e-3)
    assert row["attribution"] == pytest.approx(means[0] - means[1], abs=1e-4)
    gradients = attribute(model, [item], target="mass", method="gradients", sigma=0.7, seed=3, layers=[4], steps=4)
    assert np.isfinite(gradients["attribution"]).all() and gradients["attribution"].abs().max() > 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Both targets beside uniform attention, whose maps have no ranks."""
    monkeypatch.chdir(tmp_path)
    for target in ("loss", "mass"):
        arguments = ["attribute", "--target", target, "--limit", "4", "--layers", "4", "--control", "uniform", "--json"]
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--out", target])
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        document = json.loads(out)
        assert [row["layer"] for row in document["layers"]] == [4]
        assert document["controls"][0]["control_value"] == 0 or target == "mass"
    with pytest.raises(SystemExit) as stopped:
        main(["attribute", "--control", "shuffled"])
    assert stopped.value.code == 2


def test_bad_requests() -> None:
    with pytest.raises(UserError, match="mass"):
        attribute(MMDiT(tiny.pipeline()), [], target="mas")  # type: ignore[arg-type]
    model = MMDiT(tiny.pipeline())
    with pytest.raises(UserError, match="ablation"):
        attribute(model, [], method="ablations")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="above 0"):
        attribute(model, [], sigma=0.0)
    with pytest.raises(UserError, match="two classes"):
        attribute(model, [])
