"""The map of layers and noise levels: captions, the exchanged text by the dense computation, the run."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from mmdit_probe import UserError, load, probe
from mmdit_probe.attention import reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit import OtherText
from mmdit_probe.experiments import SigmaByLayer
from mmdit_probe.experiments.sigma_map import KINDS, first_stating, rises, stated_and_opposite, strongest
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.scenes import scene
from mmdit_probe.scenes.captions import parse
from tests import tiny
from tests.observe.test_families import written_down
from tests.tables import unexplained


def test_captions_differ_in_the_word_of_their_kind() -> None:
    seen: set[str] = set()
    for index in range(60):
        for kind, (stated, opposite) in stated_and_opposite(scene("val", index)).items():
            one, two = parse(stated), parse(opposite)
            seen.add(kind)
            assert one.grounds == two.grounds and one != two
            if kind == "noun":
                assert not {g.noun for g in one.groups} & {g.noun for g in two.groups}
                assert [g.colour for g in one.groups] == [g.colour for g in two.groups]
            else:
                assert [g.noun for g in one.groups] == [g.noun for g in two.groups]
    assert seen == {"noun", "colour", "count", "relation"}


def test_every_kind_has_its_first_scenes() -> None:
    found = first_stating("val", 3)
    every = [(number, stated_and_opposite(scene("val", number))) for number in range(found[-1][0] + 1)]
    for kind in KINDS:
        stating = [number for number, pairs in every if kind in pairs]
        assert [number for number, _, pairs in found if kind in pairs] == stating[:3]
    assert all(pairs.items() <= dict(every)[number].items() for number, _, pairs in found)


def test_a_layer_reads_the_other_samples_text(pipe: Any) -> None:
    """The edited output of image queries is the explicit softmax over own image keys and the other's text keys."""
    model = MMDiT(pipe)
    text = model.encode_prompt(["a red ring", "a cat"])
    latents = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    path = model.layers[1].path
    with written_down(pipe.transformer) as calls, torch.no_grad():
        model.denoise(latents, 0.5, text)
    call: SDPACall = calls[path][0]
    key, value = call.key.clone(), call.value.clone()
    key[:, :, 16:], value[:, :, 16:] = call.key[:, :, 16:].flip(0), call.value[:, :, 16:].flip(0)
    dense = reference.probabilities(call.query[:, :, :16], key) @ value.double()
    outputs: list[torch.Tensor] = []
    module = model.layers[1].module
    handle = module.to_out[0].register_forward_pre_hook(lambda _, arguments: outputs.append(arguments[0]))
    with probe(model, edits=OtherText(layers=[1])):
        model.denoise(latents, 0.5, text)
    handle.remove()
    torch.testing.assert_close(outputs[0].double(), dense.transpose(1, 2).flatten(2), atol=1e-5, rtol=0)


def test_rises_are_those_of_two_plain_forwards() -> None:
    model, item = load("scenes-sd3"), scene("val", 3)
    stated, opposite = stated_and_opposite(item)["noun"]
    found = rises(model, item, (stated, opposite), 0.7, 5, (4,))
    clean = model.encode_image(item.image)
    noised = model.noise(clean, 0.7, 5)
    one, two = (
        float((model.denoise(noised, 0.7, model.encode_prompt([text])) - (noised - clean) / 0.7).square().mean())
        for text in (stated, opposite)
    )
    assert found[0] == pytest.approx(two / one - 1, rel=1e-3)
    assert found[0] > 0 and found[1] != 0  # the false noun costs
    same = rises(model, item, (stated, stated), 0.7, 5, (4,))
    assert same == pytest.approx([0, 0], abs=1e-5)


def test_the_largest_rises_are_told_of_every_layer_and_of_one() -> None:
    cells = [(-1, "0.5", 0.4), (-1, "0.9", 0.1), (3, "0.5", -0.2), (3, "0.9", 0.05), (4, "0.5", 0.02), (4, "0.9", 0.03)]
    summary = pd.DataFrame(
        {"kind": "colour", "layer": layer, "sigma": sigma, "n": 9, "difference": rise, "low": rise - 0.01,
         "high": rise + 0.01, "verdict": "higher" if layer != 3 else "no difference shown"}
        for layer, sigma, rise in cells
    )  # fmt: skip
    of_every, of_one = "+0.400 [+0.390, +0.410]", "3: +0.050 [+0.040, +0.060]"
    assert strongest(summary).rows == [["colour", of_every, "0.5", of_one, "0.9", "4"]]
    none = strongest(summary.assign(verdict="lower"))
    assert none.rows[0][-1] == "none shown"


def test_run() -> None:
    result = SigmaByLayer(limit=2, layers="3,4", sigma="0.5,0.9").run(load("scenes-sd3"), progress=False)
    assert unexplained(result) == set()
    assert result.summary["n"].eq(2).all() and set(result.summary["kind"]) == set(KINDS)
    assert set(result.table["layer"]) == {-1, 3, 4} and set(result.table["sigma"]) == {"0.5", "0.9"}
    row = result.summary.query("kind == 'noun' and layer == 3 and sigma == '0.9'").iloc[0]
    values = result.table.query("kind == 'noun' and layer == 3 and sigma == '0.9'")["value"]
    assert row["difference"] == pytest.approx(values.mean()) and row["verdict"] == "too few items"
    assert result.figure().axes and "noun" in str(result.texts()[0])
    assert SigmaByLayer(sigma="0.5, 0.50000001,1").levels() == [0.50000001, 1.0]  # one name in the table
    with pytest.raises(UserError, match="above 0"):
        SigmaByLayer(sigma="1e-320")
    with pytest.raises(UserError, match="above 0"):
        SigmaByLayer(sigma="0,0.5")
    with pytest.raises(UserError, match="does not know"):
        SigmaByLayer().run(MMDiT(tiny.pipeline()), progress=False)
