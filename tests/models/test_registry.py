"""The registry: every class has an entry or a reason, and references are no image tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from mmdit_probe import load
from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import CROSS_ATTENTION, FAMILIES, SEVERAL_CALLS, family_of
from mmdit_probe.models.layout import KINDS, arranged
from tests.families import CHANNELS, FIXTURES

NO_TEXT_TO_IMAGE = {
    "AceStepTransformer1DModel", "DiTTransformer2DModel", "Kandinsky6SRTransformer3DModel",
    "LongCatAudioDiTTransformer", "MiniMaxMusic3Transformer1DModel", "PriorTransformer", "RFD4ProteinaTransformer",
    "Transformer2DModel", "TransformerTemporalModel",
}  # fmt: skip
"""Sound, proteins, embeddings, or images without a text."""


def test_every_transformer_of_the_library_has_an_entry_or_a_reason() -> None:
    known = {family.transformer for family in FAMILIES.values()} | {*CROSS_ATTENTION, *SEVERAL_CALLS}
    there = {name for name in dir(diffusers) if "Transformer" in name and name.endswith(("Model", "Transformer"))}
    assert there - known == NO_TEXT_TO_IMAGE


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_loaded_or_says_why_not(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    assert bool(family.pipelines) != bool(family.not_loaded)
    assert not family.pipelines or hasattr(diffusers, family.pipelines[0])
    index = {"_class_name": "OtherPipeline", "transformer": ["diffusers", family.transformer]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"OtherPipeline: load it with diffusers and give .* `probe`") as told:
        load(tmp_path)
    assert family.not_loaded in str(told.value) and all(one in str(told.value) for one in family.pipelines)


@pytest.mark.parametrize("name", sorted(CROSS_ATTENTION))
def test_a_class_without_joint_attention_is_told_why(name: str) -> None:
    transformer = object.__new__(getattr(diffusers, name))
    with pytest.raises(UserError, match=rf"{name} is not an MM-DiT: {CROSS_ATTENTION[name][:20]}"):
        family_of(transformer)


@pytest.mark.parametrize("references", [[], [(1, 2, 2)], [(1, 2, 2), (1, 1, 3)]])
def test_references_of_joyimage_edit_plus_are_no_image_tokens(
    references: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples differ in their references: the shorter one is padded. A value row that moves with the image is its."""
    model, inputs = FIXTURES["joyimage_edit_plus"].build(), FIXTURES["joyimage_edit_plus"].inputs(2)
    more = sum(f * h * w for f, h, w in references)
    patches = torch.cat([inputs["hidden_states"], torch.randn(2, more, CHANNELS, 1, 2, 2)], 1)
    inputs |= {"hidden_states": patches, "shape_list": [[(1, 3, 4), *references], [(1, 3, 4)]]}
    layout, places = arranged(family_of(model).arrangement(inputs, model.config))
    assert layout.grid == (3, 4) and layout.counts["reference"] == more and layout.counts["image"] == 12
    assert [len(layout.references_of(row)) for row in (0, 1)] == [len(references), 0]
    values: list[torch.Tensor] = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def recording(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        values.append(value)
        return stock(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    with torch.no_grad():
        model(**inputs)
        calls = len(values)
        model(**inputs | {"hidden_states": torch.cat([patches[:, :12] + 1.0, patches[:, 12:]], 1)})
    moved = (values[0] != values[calls]).any(3).any(1)
    for row, image in enumerate(moved):
        labels = layout.labels if places is None else layout.labels[places.keys[row].argsort()][-len(image) :]
        assert torch.equal(image, labels == KINDS.index("image"))
