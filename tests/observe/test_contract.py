"""The contract of every family (`test_families`) where it is run otherwise: in bfloat16, and with a single sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from mmdit_probe import AttentionMass, probe
from mmdit_probe.errors import RunError
from mmdit_probe.models.discover_layout import taint
from tests.families import FIXTURES
from tests.observe.test_families import Case, by_key, expected, joint_paths, run, written_down
from tests.observe.test_settings import stranger


def largest_error(case: Case, table: pd.DataFrame) -> float:
    """Of the masses in a table against the float64 softmax over the model's own calls."""
    keys = ["layer", "head", "query", "key", "span", "stream"]
    rows, found = table.groupby(keys).cumcount(), []
    assert set(table["layer"]) == set(range(len(joint_paths(case))))
    for layer, path in enumerate(joint_paths(case)):
        for row, wanted in enumerate(expected(case, path)):
            for q, query in enumerate(("image", "text")):
                part = table[(table["layer"] == layer) & (rows == row) & (table["query"] == query)]
                if wanted[:, q].isnan().any():
                    assert len(part) == 0  # text that is no query
                    continue
                found.append((by_key(part) - wanted[:, q]).abs().max())
    return float(torch.stack(found).max())


def cast(value: Any) -> Any:
    if isinstance(value, list):
        return [cast(item) for item in value]
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


# Means over ten or eight queries only, so single errors of the kernel's bfloat16 log-sum-exp show.
@pytest.mark.parametrize(
    ("batch", "grid", "dtype", "tolerance"),
    [(2, (2, 5), torch.bfloat16, 6e-5), (1, (4, 2), torch.float32, 2e-6)],
    ids=["bfloat16", "one sample"],
)
@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_masses_and_neutrality(
    name: str, batch: int, grid: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs(batch=batch, grid=grid)
    sites = taint(model, inputs)
    if dtype == torch.bfloat16:
        model.to(dtype)
        inputs = {key: value if key.endswith("ids") else cast(value) for key, value in inputs.items()}
    with written_down(model) as calls:
        stock = run(model, inputs)
    with probe(model, AttentionMass()) as watched:
        seen = run(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(stock, seen, strict=True))
    case = Case(name, model, inputs, FIXTURES[name].frames, stock, calls, sites)
    assert {call.query.dtype for path in joint_paths(case) for call in calls[path]} == {dtype}
    assert largest_error(case, watched[AttentionMass].table()) < tolerance


@pytest.mark.parametrize("name", ["chroma", "mochi", "prx"])
def test_the_contract_notices_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a log-sum-exp that is off by a thousandth, as if its kernel had another scale."""
    from mmdit_probe.attention import exact

    right = exact.attend
    monkeypatch.setattr(exact, "attend", lambda call: (right(call)[0], right(call)[1] + 1e-3))
    model, inputs = FIXTURES[name].build(), FIXTURES[name].inputs()
    with written_down(model) as calls:
        stock = run(model, inputs)
    with probe(model, AttentionMass()) as watched:
        run(model, inputs)
    case = Case(name, model, inputs, FIXTURES[name].frames, stock, calls, taint(model, inputs))
    assert largest_error(case, watched[AttentionMass].table()) > 1e-4


@pytest.mark.parametrize("name", ["mochi", "lumina2"])
def test_an_unknown_model_is_laid_out_again_when_its_masks_change(name: str) -> None:
    """These pack the text that a mask keeps: of the same shapes, other tokens are where others were."""
    calls = [FIXTURES[name].inputs(lengths=lengths) for lengths in ((7, 4), (5, 7))]
    model, known = stranger(name), FIXTURES[name].build()
    known.load_state_dict(model.inner.state_dict())
    tables = []
    for target in (model, known):
        with probe(target, AttentionMass()) as watched:
            for inputs in calls:
                run(target, inputs)
        rows = watched[AttentionMass].table().query("query == 'image' and key == 'text'")
        tables.append(rows.sort_values(["layer", "head"], kind="stable"))
    found, entry = tables
    assert len(entry) and found["n_key"].tolist() == entry["n_key"].tolist()
    assert set(found["n_key"]) == {4, 5, 7}
    torch.testing.assert_close(
        torch.tensor(found["mass"].to_numpy()), torch.tensor(entry["mass"].to_numpy()), atol=1e-6, rtol=0
    )


def test_an_unknown_model_is_laid_out_again_when_its_shapes_change() -> None:
    """The forwards that find the layout are nobody's denoising calls, although the layers are watched by then."""
    model, known = stranger("flux"), FIXTURES["flux"].build()
    calls = [
        FIXTURES["flux"].inputs(lengths=lengths, grid=grid) for lengths, grid in (((7, 7), (3, 4)), ((5, 5), (2, 2)))
    ]
    tables = []
    for target in (model, known):
        with probe(target, AttentionMass()) as watched:
            for inputs in calls:
                run(target, inputs)
        tables.append(watched[AttentionMass].table())
        assert watched._calls == 2
    found, entry = tables
    assert set(found["n_key"]) == {12, 7, 4, 5, 0}
    columns = ["layer", "head", "query", "key", "n_query", "n_key"]
    assert found[columns].equals(entry[columns])
    torch.testing.assert_close(
        torch.tensor(found["mass"].to_numpy()), torch.tensor(entry["mass"].to_numpy()), atol=1e-6, rtol=0
    )


def masses(watched: Any) -> Tensor:
    return torch.tensor(watched[AttentionMass].table()["mass"].to_numpy())


@pytest.fixture
def registry() -> Iterator[Any]:
    """Diffusers' process-wide choice of a backend, put back afterwards: `set_attention_backend` makes it too."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield _AttentionBackendRegistry
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize("backend", ["_native_math", "_native_flash", "flex"])
@pytest.mark.parametrize("chosen", ["model", "context", "inside"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_users_backend_stays_and_one_that_hides_attention_is_refused_by_name(
    backend: str, chosen: str, registry: Any
) -> None:
    """Flux asks diffusers' dispatch which kernel to take; flex attention never calls torch's function."""
    from diffusers.models.attention_dispatch import attention_backend

    model, inputs = FIXTURES["flux"].build(), FIXTURES["flux"].inputs()
    with probe(model, AttentionMass()) as plain:
        run(model, inputs)
    if chosen == "model":
        model.set_attention_backend(backend)
    before = registry._active_backend
    with ExitStack() as stack:
        if chosen == "context":
            stack.enter_context(attention_backend(backend))
        if backend == "flex":
            refusal = r"layer 0 \(transformer_blocks.0.attn, FluxAttnProcessor, backend 'flex'\)"
            stack.enter_context(pytest.raises(RunError, match=refusal))
        watched = stack.enter_context(probe(model, AttentionMass()))
        if chosen == "inside":
            stack.enter_context(attention_backend(backend))
        seen = run(model, inputs)
    assert registry._active_backend == before
    if backend != "flex":
        with attention_backend(backend):
            assert all(torch.equal(a, b) for a, b in zip(seen, run(model, inputs), strict=True))
        torch.testing.assert_close(masses(watched), masses(plain), atol=1e-6, rtol=0)
