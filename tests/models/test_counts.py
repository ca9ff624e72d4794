"""Layers and heads as a configuration tells them, against those of the transformer itself, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmdit_probe.models.families.registry import family_of
from mmdit_probe.models.layout import find_layers
from mmdit_probe.models.names import counts_of
from tests.families import FIXTURES

MORE = {"flux3", "motif_video"}
"""Families with fewer joint layers than their configuration counts: too high a number is refused after loading."""


@pytest.mark.parametrize("name", FIXTURES)
def test_a_configuration_tells_how_many_layers_and_heads_there_are(name: str, tmp_path: Path) -> None:
    transformer = FIXTURES[name].build()
    transformer.save_config(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    found = counts_of(str(tmp_path))
    assert found is not None
    layers = len(find_layers(family_of(transformer), transformer))
    assert found[0] > layers if name in MORE else found[0] == layers
    config = transformer.config
    assert found[1] == config.get("num_attention_heads", config.get("n_heads", config.get("num_heads")))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_layers": "many", "num_heads": 2}', '{"num_layers": 4}'])
def test_a_configuration_that_does_not_tell_leaves_it_to_loading(text: str, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert counts_of(str(tmp_path)) is None
    (tmp_path / "transformer" / "config.json").write_text(text)
    assert counts_of(str(tmp_path)) is None and counts_of("someone/something") is None
