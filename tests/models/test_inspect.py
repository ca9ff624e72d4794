"""`observe.inspect` and the mechanical layout: what they find, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmdit_probe.cli.models import app
from mmdit_probe.errors import UserError
from mmdit_probe.models.discover_layout import input_names, taint
from mmdit_probe.observe.inspect import inspect_call, inspect_model
from tests import tiny
from tests.families import CROSS_ATTENTION, FIXTURES


def test_a_pipeline_directory_is_inspected(tiny_directory: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tiny_directory), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["family"] == "sd3" and found["entry agrees"] is True
    assert [layer["path"] for layer in found["layers"]] == [f"transformer_blocks.{i}.attn" for i in range(tiny.LAYERS)]
    orders = [layer["order"] for layer in found["layers"]]
    assert all(order[0][0] == "image" and order[1][0] == "text" and len(order) == 2 for order in orders)
    assert {layer["kernel"] for layer in found["layers"]} == {"flash"}
    shown = CliRunner().invoke(app, ["inspect", str(tiny_directory)])
    assert "transformer_blocks.2.attn" in shown.stdout and "flash" in shown.stdout


def test_attention_that_is_not_joint_is_listed_apart() -> None:
    found = inspect_call(FIXTURES["sd35"].build(), FIXTURES["sd35"].inputs())
    assert found["other attention"] == [{"path": "transformer_blocks.0.attn2", "order": [("image", 12)]}]


def test_a_model_without_joint_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an MM-DiT"):
        inspect_call(CROSS_ATTENTION["wan"].build(), CROSS_ATTENTION["wan"].inputs())
    with pytest.raises(UserError, match=r"no model_index\.json"):
        inspect_model(tmp_path)
    with pytest.raises(UserError, match="no embedded model or directory"):
        inspect_model(tmp_path / "nothing")


def test_a_twin_has_the_folder_of_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(source: Path) -> None:
        raise FileNotFoundError(source)

    monkeypatch.setattr("mmdit_probe.observe.inspect._pipeline", stop)
    with pytest.raises(FileNotFoundError, match=r"scenes-sd3$"):
        inspect_model("scenes-sd3-random")
    with pytest.raises(UserError, match=r"directory of this name\) 'scenes': .* Known: scenes-sd3, scenes-sd3-random$"):
        inspect_model("scenes")


def test_cross_attention_shows_as_text_keys_only() -> None:
    sites = taint(CROSS_ATTENTION["pixart"].build(), CROSS_ATTENTION["pixart"].inputs())
    assert [[kind for kind, _ in site.order()] for site in sites.values()] == [["image"], ["text"]] * 2
    from_others = [
        {count != len(labels) for count, labels in zip(site.queries, site.labels, strict=True)}
        for site in sites.values()
    ]
    assert from_others == [{False}, {True}] * 2
    assert not any(site.joint for site in sites.values())


def test_taint_changes_nothing_of_the_model() -> None:
    model, inputs = FIXTURES["flux"].build().train(), FIXTURES["flux"].inputs()
    before: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    taint(model, inputs)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_are_known_by_their_names() -> None:
    inputs = FIXTURES["hunyuan_video15"].inputs()
    assert input_names(inputs) == (["hidden_states"], ["encoder_hidden_states", "encoder_hidden_states_2"])
    with pytest.raises(UserError, match="no argument holds text"):
        input_names({"hidden_states": torch.zeros(1)})
