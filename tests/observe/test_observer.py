"""Observers as transactions: what is not finite, failed or was cut short leaves nothing behind; how rows are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe import AttentionMass, TextMaps, ValueNorm, probe
from mmdit_probe.attention import reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.gradients import streamed_lse
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.concepts import ConceptStream
from mmdit_probe.observe.maps import PARTS, JointBlocks
from mmdit_probe.observe.observer import DenoisingCall, Observer, RowBatch, RowObserver
from mmdit_probe.observe.pca import PCA, Projection
from mmdit_probe.observe.sinks import Channels, KeyMass, SinkFree
from mmdit_probe.results.tables import MemorySink
from mmdit_probe.specs import ALL_HEADS
from tests import tiny

BROKEN = 1
"""The layer that is broken in the tests."""


def sample(pipe: Any, **options: Any) -> None:
    pipe("a red ring", **{"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent",
         "max_sequence_length": tiny.T5_LENGTH, "generator": torch.Generator().manual_seed(1)} | options)  # fmt: skip


class Spoiled:
    """Spoils one projection of a layer from the second forward on."""

    def __init__(self, pipe: Any, name: str, value: float, elements: Any = slice(None)) -> None:
        self.value, self.elements, self.calls = value, elements, 0
        module = getattr(pipe.transformer.transformer_blocks[BROKEN].attn, name)
        self.handle = module.register_forward_hook(self.spoil)

    def spoil(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 1:
            output = output.clone()
            output[..., self.elements] = self.value
        return output


def fitted() -> Projection:
    pipe, basis = tiny.pipeline(), PCA(components=2)
    with probe(pipe, basis):
        sample(pipe)
    return Projection(basis)


OBSERVERS = {
    "mass": AttentionMass,
    "norms": ValueNorm,
    "maps": lambda: TextMaps(heads="all"),
    "t2i": lambda: TextMaps(queries="text"),
    "pca": PCA,
    "projection": fitted,
    "own": lambda: Projection(PCA(components=2), each=True),
    "keys": KeyMass,
    "channels": Channels,
    "sink-free": SinkFree,
    **{part: lambda part=part: JointBlocks(range(tiny.LAYERS), [part]) for part in PARTS},
}


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_the_run_and_names_layer_and_step(pipe: Any, name: str, value: float) -> None:
    observer = OBSERVERS[name]()
    Spoiled(pipe, "to_v" if name == "norms" else "to_k", value)
    with (
        pytest.raises(RunError, match=rf"^layer {BROKEN}: .* is not finite at step 1 \(in float32: "),
        probe(pipe, observer),
    ):
        sample(pipe)


def test_float16_is_told_to_take_bfloat16(pipe: Any) -> None:
    pipe.to(dtype=torch.float16)
    Spoiled(pipe, "to_q", 7e4)  # infinite in float16
    message = r"layer 1: attention is not finite at step 1 \(float16 overflow\? try dtype bfloat16\)"
    with pytest.raises(RunError, match=message), probe(pipe, AttentionMass()):
        sample(pipe)


@pytest.mark.parametrize("observer", [AttentionMass, ValueNorm, KeyMass, Channels])
def test_finished_calls_stay_and_rows_of_the_broken_one_do_not(pipe: Any, observer: Any) -> None:
    """One NaN in one channel: partly NaN rows are no rows either, and no observer of the call gets any."""
    seen, other = observer(), AttentionMass(rows="layer")
    Spoiled(pipe, "to_v" if observer is ValueNorm else "to_k", float("nan"), 3)
    with pytest.raises(RunError, match="layer 1"), probe(pipe, other, seen):
        sample(pipe)
    for table in (seen.table(), other.table()):
        assert set(table["step"]) == {0} and len(table) > 0
        numbers = table.select_dtypes("number")
        assert np.isfinite(numbers.to_numpy(float)).all()


@pytest.mark.parametrize("observer", [AttentionMass, ValueNorm, KeyMass, Channels])
def test_a_call_that_fails_leaves_no_rows(pipe: Any, observer: Any) -> None:
    calls = []

    def fail(module: Any, inputs: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with probe(pipe, observer()) as run:
        last = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            sample(pipe)
        last.remove()
        cut = set(run.observers[0].table()["step"])  # type: ignore[attr-defined]
        sample(pipe)
    table = run.observers[0].table()  # type: ignore[attr-defined]
    assert cut == {0}
    with probe(tiny.pipeline(), observer()) as whole:
        sample(whole.pipeline)
    expected = whole.observers[0].table()  # type: ignore[attr-defined]
    assert len(table) == 1.5 * len(expected)


def test_a_concept_stream_leaves_the_outputs_of_the_last_good_call(pipe: Any) -> None:
    model = MMDiT(pipe)
    text = model.encode_prompt("a red ring")
    stream, latents = ConceptStream(pipe.transformer, text.prompt_embeds[0]), torch.randn(1, 4, 8, 8)
    with probe(model, stream), stream.listening():
        model.denoise(latents, 0.5, text)
        before = stream.outputs
        Spoiled(pipe, "add_q_proj", float("nan")).calls = 1
        with pytest.raises(RunError, match="layer 1: attention is not finite at step 0"):
            model.denoise(latents, 0.5, text)
    assert stream.outputs is before and set(before) == set(range(tiny.LAYERS))
    with probe(model, stream), pytest.raises(UserError, match=r"inside `stream\.listening"):
        model.denoise(latents, 0.5, text)


def test_an_observer_can_be_three_lines(pipe: Any) -> None:
    class MeanLength(Observer):
        def measure(self, seen: Any) -> torch.Tensor:
            return seen.call.query.norm(dim=-1).mean()

        def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
            self.lengths = measured

    with probe(pipe, MeanLength(), layers="0,2") as run:
        sample(pipe)
    assert list(run[MeanLength].lengths) == [0, 2]


def test_rows_of_one_s_own_may_be_of_some_calls_alone(pipe: Any) -> None:
    class Late(RowObserver):
        columns = ("step", "layer", "head", "length")

        def measure(self, seen: Any) -> torch.Tensor:
            return seen.call.query.norm(dim=-1).mean((0, 2))  # [H]

        def add_rows(self, batch: RowBatch, measured: dict[int, Any]) -> None:
            for layer, lengths in measured.items() if batch.denoising.step > 0 else ():
                batch.add(None, [{"head": range(tiny.HEADS)}], layer=np.array(layer), length=lengths.numpy())

    with probe(pipe, Late(), layers="0,2") as run:
        sample(pipe)
    table = run[Late].table()
    assert len(table) == 2 * tiny.HEADS and set(table["step"]) == {1} and set(table["layer"]) == {0, 2}
    with pytest.raises(UserError, match=r"sink is 'rows\.csv': expected a function of the columns"):
        Late("rows.csv")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [float, np.float32, lambda value: {"rows": [np.array([1.0, value])[::-1]]}])
def test_numbers_and_arrays_that_are_not_finite_stop_the_run_as_tensors_do(pipe: Any, kind: Any) -> None:
    class Odd(Observer):
        def measure(self, seen: Any) -> Any:
            return kind(np.nan if seen.layer.index == BROKEN else 2.0)

        def commit(self, denoising: DenoisingCall, measured: dict[int, Any]) -> None:
            raise AssertionError(measured)

    with pytest.raises(RunError, match="layer 1: attention is not finite at step 0"), probe(pipe, Odd()):
        sample(pipe)


CALL = DenoisingCall(4, 3, [0.7, 0.6], ["a", "b"], [5, -1], ["cond", "uncond"])


def test_a_batch_is_the_outer_product_of_its_axes() -> None:
    assert "_tables" not in repr(CALL)  # which would print every token
    batch = RowBatch(CALL)
    values = np.arange(8.0).reshape(2, 2, 2)
    for number in range(2):
        axes = [{"layer": [3, 5]}, {"head": (0, 1)}, {"span": ["word", "pad"], "n_key": [2, 7]}]
        batch.add(number, axes, mass=values + 10 * number)
    columns = batch.columns(["prompt", "seed", "step", "sigma", "branch", "layer", "head", "span", "n_key", "mass"])
    table = pd.DataFrame(columns)
    assert table["mass"].tolist() == [*range(8), *range(10, 18)]
    assert table["layer"].tolist() == [3, 3, 3, 3, 5, 5, 5, 5] * 2
    assert table["head"].tolist() == [0, 0, 1, 1] * 4
    assert table["span"].tolist() == ["word", "pad"] * 8 and table["n_key"].tolist() == [2, 7] * 8
    assert (
        table["prompt"].tolist() == ["a"] * 8 + ["b"] * 8 and table["branch"].tolist() == ["cond"] * 8 + ["uncond"] * 8
    )
    assert table["seed"].tolist() == [5] * 8 + [-1] * 8 and set(table["step"]) == {3}
    assert table["sigma"].tolist() == [0.7] * 8 + [0.6] * 8
    assert all(isinstance(columns[name], pd.Categorical) for name in ("prompt", "branch", "span"))


def test_a_batch_takes_the_columns_of_the_same_axes_and_labels_from_the_one_before() -> None:
    names = ["prompt", "seed", "step", "sigma", "branch", "layer", "mass"]
    axes = [{"layer": [3, 5]}, {"span": ["word", "pad"]}]

    def columns(call: DenoisingCall, axes: Any, before: RowBatch | None, start: float) -> tuple[RowBatch, Any]:
        batch = RowBatch(call, before)
        batch.add(0, axes, mass=start + np.arange(4.0).reshape(2, 2))
        return batch, batch.columns(names)

    first, one = columns(CALL, axes, None, 0)
    later, two = columns(replace(CALL, step=4, sigmas=[0.5, 0.4]), axes, first, 10)
    assert all(one[name] is two[name] for name in ("prompt", "seed", "branch", "layer"))
    assert set(two["step"]) == {4} and set(two["sigma"]) == {0.5} and two["mass"].tolist() == [10, 11, 12, 13]
    for call, other in ((replace(CALL, prompts=["c", "b"]), axes), (CALL, [{"layer": [7]}, axes[1]])):
        batch = RowBatch(call, later)
        batch.add(0, other, mass=np.zeros((1, 2)))
        found = pd.DataFrame(batch.columns(names))
        assert found["prompt"].tolist() == [call.prompts[0]] * len(found)
        assert set(found["layer"]) == set(other[0]["layer"])


def test_memory_gives_back_what_was_written_in_few_bytes(pipe: Any) -> None:
    parts: list[dict[str, Any]] = []
    sink = MemorySink()

    def both(columns: dict[str, Any]) -> None:
        parts.append({"item": np.full(len(columns["mass"]), 300, np.int32), **columns})
        sink.write({"item": 300, **columns})

    with probe(pipe, AttentionMass(both)):
        sample(pipe, num_inference_steps=3)
    table = sink.table()
    for name in table:
        written = np.concatenate([np.asarray(part[name]) for part in parts])
        assert np.array_equal(table[name].to_numpy(), written), name
        assert table[name].dtype.kind == "O" or table[name].dtype == written.dtype, name
    assert len(parts) == 3 and len(sink) == len(table) > 500
    assert sink.nbytes / len(sink) <= 24


@pytest.mark.parametrize("observer", [AttentionMass, KeyMass])
def test_rows_of_layers_are_the_mean_over_the_heads(pipe: Any, observer: Any) -> None:
    each, mean = MemorySink(), MemorySink()
    for sink, rows in ((each, "head"), (mean, "layer")):
        with probe(pipe, observer(sink, heads=[0, 1], rows=rows)):
            sample(pipe, num_inference_steps=1)
    cell = [name for name in observer.columns if name not in ("head", "mass", "uniform", "sigma")]
    expected = each.table().astype({"mass": float}).groupby(cell, observed=True)["mass"].mean()
    table = mean.table()
    assert set(table["head"]) == {ALL_HEADS} and len(table) == len(expected)
    found = table.set_index(cell)["mass"]
    assert (found - expected.reindex(found.index)).abs().max() < 1e-7


def test_rows_of_layers_of_norms_are_the_concatenation(pipe: Any) -> None:
    with probe(pipe, ValueNorm(rows="layer")) as run:
        sample(pipe)
    with probe(pipe, ValueNorm()) as every:
        sample(pipe)
    whole = every[ValueNorm].table()
    expected = whole[whole["head"] == ALL_HEADS].reset_index(drop=True)
    pd.testing.assert_frame_equal(run[ValueNorm].table(), expected)
    with pytest.raises(UserError, match="layer"):
        ValueNorm(rows="layers")  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_a_logsumexp_without_a_kernel_is_the_reference_s(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 300, 16, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 300, 300, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask[0, 0, 5] = False
    call = SDPACall(query, key, key, mask)
    expected = reference.logsumexp(query, key, mask)
    live = torch.ones(2, 3, 300, dtype=torch.bool)
    if mask is not None:
        live[0, :, 5] = False
    assert (streamed_lse(call) - expected)[live].abs().max() < 1e-5
    assert (streamed_lse(call)[~live] == 0).all()  # as the kernels have it: such a row has no probabilities
