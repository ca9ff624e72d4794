"""AttentionMass inside real pipelines against the explicit softmax in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmdit_probe import AttentionMass, probe
from mmdit_probe.attention import exact
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import watch
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.layout import Layout
from mmdit_probe.models.tokens import token_tables
from mmdit_probe.observe import mass
from mmdit_probe.observe.mass import COLUMNS, KeyGroups, attention_masses
from tests import tiny
from tests.families import FIXTURES
from tests.observe.oracle import attentions
from tests.observe.test_families import run as forward

IMAGE, TEXT = 16, tiny.CLIP_LENGTH + tiny.T5_LENGTH
N = IMAGE + TEXT
PROMPTS = ["a red ring", "a cat"]


def sample(pipe: Any, **options: Any) -> Any:
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"} | options
    return pipe(
        PROMPTS, max_sequence_length=tiny.T5_LENGTH, generator=torch.Generator().manual_seed(1), **options
    ).images


@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance"),
    [
        ("sd3", torch.float32, 1e-6),
        ("sd35", torch.float32, 1e-6),
        ("no-t5", torch.float32, 1e-6),
        ("sd3", torch.bfloat16, 3e-5),
        ("sd35", torch.bfloat16, 3e-5),
    ],
)
def test_every_row_of_the_table_is_the_explicit_softmax(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    pipe = tiny.pipeline(variant).to(dtype=dtype)
    dense = attentions(lambda: sample(pipe), N)
    assert len(dense) == 2 * tiny.LAYERS
    with probe(pipe, AttentionMass()) as run:
        sample(pipe)
    table = run[AttentionMass].table()
    assert list(table.columns) == list(COLUMNS)

    cond = token_tables(pipe, FAMILIES["sd3"], PROMPTS, tiny.T5_LENGTH)
    uncond = token_tables(pipe, FAMILIES["sd3"], ["", ""], tiny.T5_LENGTH)
    rows = [("uncond", 0, uncond[0]), ("uncond", 1, uncond[1]), ("cond", 0, cond[0]), ("cond", 1, cond[1])]
    checked = 0
    for step in range(2):
        for layer in range(tiny.LAYERS):
            attention = dense[step * tiny.LAYERS + layer]
            for place, (branch, image, tokens) in enumerate(rows):
                part = table[
                    (table["step"] == step)
                    & (table["layer"] == layer)
                    & (table["branch"] == branch)
                    & (table["prompt"] == PROMPTS[image])
                ]
                for row in part.itertuples():
                    queries = slice(0, IMAGE) if row.query == "image" else slice(IMAGE, N)
                    keys = (
                        list(range(IMAGE))
                        if row.key == "image"
                        else []
                        if row.key == "other"
                        else [IMAGE + p for p in tokens.positions(kind=row.span, stream=row.stream)]
                    )
                    expected = attention[place, row.head, queries][:, keys].sum(-1).mean().item()
                    assert row.mass == pytest.approx(expected, abs=tolerance), row
                    assert row.n_key == len(keys) and row.uniform == pytest.approx(len(keys) / N)
                    assert row.n_query == (IMAGE if row.query == "image" else TEXT)
                    checked += 1
    assert checked == len(table) > 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_one_by_one_give_what_they_give_together(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Layers of large calls are not kept for the end of the forward; those of the oracle's test are."""
    pipe = tiny.pipeline().to(dtype=dtype)
    calls, found = [], []
    monkeypatch.setattr(mass, "attention_masses", lambda *given: (calls.append(given), attention_masses(*given))[1])
    for small in (mass.SMALL, 0):
        monkeypatch.setattr(mass, "SMALL", small)
        with probe(pipe, AttentionMass(heads={1: [1]})) as run:
            sample(pipe)
        found.append(run[AttentionMass].table())
    assert len(calls) == 2 + 2 * tiny.LAYERS
    assert np.abs(found[0].pop("mass") - found[1].pop("mass")).max() < 1e-6
    assert found[0].equals(found[1])


def test_masses_of_a_query_kind_sum_to_one(pipe: Any) -> None:
    with probe(pipe, AttentionMass()) as run:
        sample(pipe)
    table = run[AttentionMass].table()
    sums = table.groupby(["prompt", "seed", "step", "branch", "layer", "head", "query"])[["mass", "uniform"]].sum()
    assert (sums["mass"] - 1).abs().max() < 1e-5
    assert np.allclose(sums["uniform"], 1.0)
    assert set(table["key"]) == {"image", "text", "other"}


def test_image_only_attention_is_never_counted() -> None:
    """SD3.5's attn2 makes attention calls too: as many rows come out as from a model without it."""
    counts = []
    for variant in ("sd3", "sd35"):
        pipe = tiny.pipeline(variant)
        with probe(pipe, AttentionMass()) as run:
            sample(pipe)
        counts.append(len(run[AttentionMass].table()))
    assert counts[0] == counts[1]


def joint(seed: int = 0) -> SDPACall:
    generator = torch.Generator().manual_seed(seed)
    return SDPACall(*(1.5 * torch.randn(1, 2, 12, 16, generator=generator) for _ in range(3)))


LAYOUT = Layout.from_counts([("image", 6), ("text", 4), ("other", 2)])
GROUPS = [[2, 3, 3, 4]]
CPU = torch.device("cpu")
KEYS = KeyGroups.of(LAYOUT, GROUPS, CPU)


def test_text_first_and_image_first_agree_after_relabelling() -> None:
    call = joint()
    order = torch.tensor([*range(6, 12), *range(6)])
    turned = SDPACall(call.query[:, :, order], call.key[:, :, order], call.value[:, :, order])
    layout = Layout(LAYOUT.labels[order])
    one = attention_masses(call, exact.attend(call)[1], KEYS)[0]
    two = attention_masses(turned, exact.attend(turned)[1], KeyGroups.of(layout, GROUPS, CPU))[0]
    assert torch.allclose(one, two, atol=1e-6)


def test_scattered_text_takes_the_same_masses() -> None:
    call = joint()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    mixed = SDPACall(call.query[:, :, order], call.key[:, :, order], call.value[:, :, order])
    labels = LAYOUT.labels[order]
    groups = [[GROUPS[0][int(place) - 6] for place in order if 6 <= place < 10]]
    one = attention_masses(call, exact.attend(call)[1], KEYS)[0]
    two = attention_masses(mixed, exact.attend(mixed)[1], KeyGroups.of(Layout(labels), groups, CPU))[0]
    assert torch.allclose(one, two, atol=1e-6)


def test_the_indicator_path_gives_the_same_numbers() -> None:
    call = joint()
    with_lse, _ = attention_masses(call, exact.attend(call)[1], KEYS)
    without, n_query = attention_masses(call, None, KEYS)
    assert torch.allclose(with_lse, without, atol=1e-6)
    assert n_query.tolist() == [[6, 4]]


@pytest.mark.parametrize("use_lse", [True, False])
def test_fully_masked_queries_are_left_out_of_the_mean(use_lse: bool) -> None:
    call = joint()
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    mask[0, 0, 2] = False
    mask[0, 0, :, 11] = False
    masked = SDPACall(call.query, call.key, call.value, mask)
    masses, n_query = attention_masses(masked, exact.attend(masked)[1] if use_lse else None, KEYS)
    assert n_query.tolist() == [[5, 4]]
    assert (masses.sum(-1) - 1).abs().max() < 1e-5
    from mmdit_probe.attention import reference

    dense = reference.probabilities(call.query, call.key, mask)
    expected = dense[:, :, [0, 1, 3, 4, 5], 6:10].sum(-1).mean(-1)
    assert (masses[:, :, 0, 2:].sum(-1) - expected).abs().max() < 1e-6


def test_heads_are_selected(pipe: Any) -> None:
    with probe(pipe, AttentionMass(heads=1), AttentionMassOfAll()) as run:
        sample(pipe, num_inference_steps=1)
    one, every = (observer.table() for observer in run.observers)  # type: ignore[attr-defined]
    assert set(one["head"]) == {1}
    assert np.array_equal(one["mass"], every[every["head"] == 1]["mass"])


class AttentionMassOfAll(AttentionMass):
    """A second class, so that both observers are told apart."""


def test_a_writer_gets_plain_columns_and_has_the_table(pipe: Any) -> None:
    class Writer:
        def __init__(self) -> None:
            self.parts: list[dict[str, np.ndarray]] = []

        def write(self, columns: dict[str, np.ndarray]) -> None:
            self.parts.append(columns)

    from mmdit_probe.errors import UserError

    writer = Writer()
    with probe(pipe, AttentionMass(sink=writer), AttentionMassOfAll()) as run:
        sample(pipe)
    joined = {name: np.concatenate([part[name] for part in writer.parts]) for name in COLUMNS}
    table = run[AttentionMassOfAll].table()
    assert all(np.array_equal(joined[name], table[name].to_numpy()) for name in COLUMNS)
    assert len(writer.parts) == 2 and joined["prompt"].dtype == object  # one batch per denoising call
    with pytest.raises(UserError, match="Writer"):
        run.observers[0].table()  # type: ignore[attr-defined]


def test_keys_that_a_mask_hides_are_not_counted() -> None:
    layout = Layout.from_counts([("image", 4), ("text", 3)], (2, 2))
    hidden = torch.tensor([[False] * 7, [False] * 3 + [True] + [False, True, True]])
    seen = layout.without(hidden)
    assert [seen.key_count("text", row) for row in (0, 1)] == [3, 1]
    assert [seen.key_count("image", row) for row in (0, 1)] == [4, 3] and layout.key_count("text", 0) == 3


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video", "lumina2"])
def test_layers_that_hide_the_same_keys_share_their_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are built once in a forward; a mask that is changed in place between two layers is another one."""
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    built, of = [], KeyGroups.of
    monkeypatch.setattr(KeyGroups, "of", lambda *given: built.append(given) or of(*given))
    with probe(model, AttentionMass()) as run:
        forward(model, inputs)
        forward(model, inputs)
    assert len(built) <= 2  # one, where a second forward has the layout of the first
    table = run[AttentionMass].table()

    def hiding(call: SDPACall, module_call: Any) -> SDPACall:
        assert call.attn_mask is not None
        call.attn_mask[..., 0] = False
        return call

    detach = watch(run.layers[1].module, hiding, "input")
    with probe(model, AttentionMass()) as changed:
        forward(model, inputs)
    detach()
    rows = "head == 0 and query == 'image'"
    before, after = (of.query(rows).groupby("layer")["n_key"].sum() for of in (table, changed[AttentionMass].table()))
    assert (after[0], after[1]) == (before[0] / 2, before[1] / 2 - 2)  # of two samples, in one forward of two
