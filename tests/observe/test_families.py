"""The contract of every family: what a probe says of a tiny random model is what the float64 softmax over the model's
own queries, keys, mask and scale says, with the kinds of keys found mechanically; and observing changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mmdit_probe.attention import exact, reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import watch
from mmdit_probe.edit import Blur, GridBlur, Scale
from mmdit_probe.edit.edits import blur_matrix, taps
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.discover_layout import Site, taint
from mmdit_probe.models.families.registry import FAMILIES, family_of
from mmdit_probe.models.layout import arranged, find_layers
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.norms import ValueNorm
from mmdit_probe.observe.observer import LayerCall, Observer
from mmdit_probe.observe.probe import probe
from mmdit_probe.observe.sinks import KeyMass
from tests.families import CROSS_ATTENTION, FIXTURES, SEVERAL_CALLS

IMAGE, TEXT, OTHER, REFERENCE = range(4)
FOUND = ["image", "text", "other"]
"""Kinds of key that are told apart mechanically: references that are an input of their own are others there."""


@dataclass
class Case:
    """A model, its inputs, and what is true of it without the probe."""

    name: str
    model: Any
    inputs: dict[str, Any]
    frames: int
    output: list[Tensor]
    calls: dict[str, list[SDPACall]]
    """Attention calls of every joint module, by path, in order."""
    sites: dict[str, Site]


@contextmanager
def written_down(model: Any) -> Iterator[dict[str, list[SDPACall]]]:
    """Every attention call by the path of the attention module that makes it; nothing of the probe is involved."""
    stock = torch.nn.functional.scaled_dot_product_attention
    calls: dict[str, list[SDPACall]] = {}
    running: list[str] = []

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        calls.setdefault(running[-1], []).append(SDPACall.bind(args, kwargs))
        return stock(*args, **kwargs)

    handles = []
    for path, module in model.named_modules():
        if hasattr(module, "processor"):
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
            handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    torch.nn.functional.scaled_dot_product_attention = recording
    running.append("outside")
    try:
        yield calls
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in flat(part)]


def run(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return flat(model(**inputs, return_dict=False))


@functools.cache
def case_of(name: str) -> Case:
    fixture = FIXTURES[name]
    model, inputs = fixture.build(), fixture.inputs(batch=2, grid=(3, 4))
    with written_down(model) as calls:
        output = run(model, inputs)
    return Case(name, model, inputs, fixture.frames, output, calls, taint(model, inputs))


@pytest.fixture(params=sorted(FIXTURES))
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def samples(case: Case, path: str) -> list[tuple[SDPACall, int, Tensor]]:
    """(call, row of it, kinds of its keys) of every sample at one layer, masked keys of kind -1."""
    calls, found = case.calls[path], []
    for sample, labels in enumerate(case.sites[path].labels):
        call, row = (calls[0], sample) if len(calls) == 1 else (calls[sample], 0)
        kinds = labels.clone()
        if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
            mask = call.attn_mask.expand(len(call.query), 1, call.attn_mask.shape[-2], -1)[row, 0]
            kinds[~mask.any(0)] = -1
        found.append((call, row, kinds))
    return found


def expected(case: Case, path: str) -> list[Tensor]:
    """Per sample, mass [H, query kind, key kind] by the explicit softmax; NaN where there is no such query."""
    found = []
    for call, row, kinds in samples(case, path):
        mask = None if call.attn_mask is None else call.attn_mask.expand(len(call.query), *call.attn_mask.shape[1:])
        p = reference.probabilities(
            call.query[row : row + 1], call.key[row : row + 1], None if mask is None else mask[row : row + 1],
            call.is_causal, call.scale,
        )[0]  # fmt: skip
        queries = kinds if p.shape[-2] == len(kinds) else kinds[kinds == IMAGE]
        masses = torch.stack([p[:, :, kinds == kind].sum(-1) for kind in range(3)], -1)  # [H, Nq, 3]
        found.append(torch.stack([masses[:, queries == query].mean(1) for query in (IMAGE, TEXT)], 1))
    return found


def by_key(table: pd.DataFrame) -> Tensor:
    """Masses [H, `FOUND`] of one query kind in one layer and sample."""
    key = table["key"].astype(str).replace("reference", "other")
    return torch.tensor(table.groupby(["head", key])["mass"].sum().unstack()[FOUND].to_numpy(float))


def joint_paths(case: Case) -> list[str]:
    return [path for path, site in case.sites.items() if site.joint]


def test_the_layers_are_those_that_mix_image_and_text(case: Case) -> None:
    layers = find_layers(family_of(case.model), case.model)
    assert [layer.path for layer in layers] == joint_paths(case)
    assert all(case.sites[layer.path].regular for layer in layers)
    assert not any(layer.attends(1) for layer in layers)  # every module tells that it has more heads


def test_the_entry_agrees_with_the_mechanical_layout(case: Case) -> None:
    layout, places = arranged(family_of(case.model).arrangement(case.inputs, case.model.config))
    for path in joint_paths(case):
        for sample, (_, _, kinds) in enumerate(samples(case, path)):
            if places is None:
                labels = layout.labels
            else:
                labels = torch.full_like(kinds, OTHER)  # padding of a shorter sample
                there = places.keys[sample] >= 0
                labels[places.keys[sample][there]] = layout.labels[there]
            agreeing = (labels == kinds) | (kinds == -1) | ((labels == REFERENCE) & (kinds == OTHER))
            assert len(labels) == len(kinds) and bool(agreeing.all()), (path, sample, labels, kinds)
    assert layout.grid == (3, 4) and layout.frames == case.frames
    assert layout.counts["image"] == 12 * case.frames


def test_observing_is_bitwise_neutral(case: Case) -> None:
    with probe(case.model, AttentionMass(), ValueNorm(), TextMaps()):
        seen = run(case.model, case.inputs)
    after = run(case.model, case.inputs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(case.output, seen, after, strict=True))


def test_masses_are_those_of_the_explicit_softmax(case: Case) -> None:
    with probe(case.model, AttentionMass()) as watched:
        run(case.model, case.inputs)
    table = watched[AttentionMass].table()
    table["row"] = (table.groupby(["layer", "head", "query", "key", "span", "stream"]).cumcount()).to_numpy()
    paths = joint_paths(case)
    assert sorted(table.layer.unique()) == list(range(len(paths)))
    for layer, path in enumerate(paths):
        for row, masses in enumerate(expected(case, path)):
            for q, query in enumerate(("image", "text")):
                part = table[(table.layer == layer) & (table["row"] == row) & (table["query"] == query)]
                if masses[:, q].isnan().any():
                    assert len(part) == 0
                    continue
                found = by_key(part)
                # Keys that a sample lacks have no kind; what is masked has no mass.
                torch.testing.assert_close(found, masses[:, q], atol=2e-6, rtol=0)
                counts = part[part["head"] == 0].groupby("key").n_key.sum()
                kinds = samples(case, path)[row][2]
                assert counts["image"] == int((kinds == IMAGE).sum())
                assert counts["text"] == int((kinds == TEXT).sum())


@pytest.mark.parametrize("case", ["qwen_image", "hunyuan_video", "lumina2", "flux"], indirect=True)
def test_single_keys_are_counted_without_those_that_a_sample_lacks(case: Case) -> None:
    """Padding is neither key nor query: the mean over text queries leaves it out, and uniform attention gives 1 / N to
    each of the N keys that are there."""
    with probe(case.model, KeyMass()) as watched:
        run(case.model, case.inputs)
    table = watched[KeyMass].table()
    place = ["layer", "head", "query", "position"]
    table["row"] = table.groupby(place).cumcount()
    for layer, path in enumerate(joint_paths(case)):
        for row, (masses, (_, _, kinds)) in enumerate(zip(expected(case, path), samples(case, path), strict=True)):
            part = table[(table["layer"] == layer) & (table["row"] == row)]
            for q, query in enumerate(("image", "text")):
                found = part[part["query"] == query]
                sums = found.groupby(["head", "token"])["mass"].sum().unstack().reindex(columns=FOUND, fill_value=0.0)
                torch.testing.assert_close(torch.tensor(sums.to_numpy(float)), masses[:, q], atol=2e-6, rtol=0)
                there = int((kinds >= 0).sum())
                shares = found[found["head"] == 0]["uniform"]
                assert sorted(shares[shares > 0]) == pytest.approx([1 / there] * there)
                assert (found[found["uniform"] == 0]["mass"] == 0).all()


@pytest.mark.parametrize("case", [name for name, of in FIXTURES.items() if of.frames > 1], indirect=True)
@pytest.mark.parametrize("use_lse", [True, False])
def test_a_videos_image_mass_is_split_by_frame(case: Case, use_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the same frame are those whose place among the image tokens is in the same run of h w."""
    if not use_lse:  # a device whose kernels give none
        monkeypatch.setattr(exact, "logsumexp", lambda call: None)
        monkeypatch.setattr(exact, "attend", lambda call: (call.stock(), None))
    with probe(case.model, AttentionMass(), layers=[1]) as watched:
        run(case.model, case.inputs)
    table = watched[AttentionMass].table().query("key == 'image'")
    frame = torch.arange(case.frames).repeat_interleave(12)
    same = frame[:, None] == frame[None]
    for row, (call, of, kinds) in enumerate(samples(case, joint_paths(case)[1])):
        mask = None if call.attn_mask is None else call.attn_mask.expand(len(call.query), *call.attn_mask.shape[1:])
        p = reference.probabilities(
            call.query[of : of + 1], call.key[of : of + 1], None if mask is None else mask[of : of + 1],
            call.is_causal, call.scale,
        )[0]  # fmt: skip
        image = kinds == IMAGE
        block = (p[:, image] if p.shape[-2] == len(kinds) else p)[..., image]
        for span, chosen in (("same frame", same), ("other frames", ~same)):
            part = table[(table["query"] == "image") & (table["span"] == span)]
            found = part[part.groupby("head").cumcount() == row]
            wanted = (block * chosen).sum(-1).mean(-1)
            np.testing.assert_allclose(found["mass"], wanted, atol=2e-6)
            assert set(found["n_key"]) == {12 if span == "same frame" else 12 * (case.frames - 1)}
    assert set(table.query("query == 'image'")["span"]) == {"same frame", "other frames"}
    assert set(table.query("query == 'text'")["span"]) <= {"all"}


def test_text_maps_are_columns_of_the_explicit_softmax(case: Case) -> None:
    with probe(case.model, TextMaps(heads="all"), layers=1) as watched:
        run(case.model, case.inputs)
    maps = watched[TextMaps].maps(1, branch=None)
    space = (3, 4) if case.frames == 1 else (case.frames, 3, 4)
    assert maps.shape[2:-1] == space and len(maps) == 2
    path = joint_paths(case)[1]
    layout, places = arranged(family_of(case.model).arrangement(case.inputs, case.model.config))
    for sample, (call, row, kinds) in enumerate(samples(case, path)):
        mask = None if call.attn_mask is None else call.attn_mask.expand(len(call.query), *call.attn_mask.shape[1:])
        p = reference.probabilities(
            call.query[row : row + 1], call.key[row : row + 1], None if mask is None else mask[row : row + 1],
            call.is_causal, call.scale,
        )[0]  # fmt: skip
        image = kinds == IMAGE
        p = p[:, image] if p.shape[-2] == len(kinds) else p
        if places is None:
            columns = p[..., layout.labels == TEXT]
        else:
            index = places.keys[sample][layout.labels == TEXT]
            columns = p[..., index.clamp(min=0)] * (index >= 0)
        found = maps[sample].reshape(len(p), image.sum(), -1)
        torch.testing.assert_close(found.double(), columns, atol=3e-6, rtol=0)


def test_value_norms_leave_out_tokens_that_are_not_there(case: Case) -> None:
    with probe(case.model, ValueNorm(), layers=0) as watched:
        run(case.model, case.inputs)
    table = watched[ValueNorm].table().query("head == -1 and token == 'text'")
    for row, (call, of, kinds) in enumerate(samples(case, joint_paths(case)[0])):
        norms = call.expanded_value()[of].transpose(0, 1).flatten(1).norm(dim=-1)[kinds == TEXT]
        assert table.iloc[row].n_token == len(norms)
        assert table.iloc[row].norm == pytest.approx(float(norms.mean()), rel=1e-5)


def test_a_layer_can_be_selected(case: Case) -> None:
    with probe(case.model, AttentionMass(), layers=[1]) as watched:
        run(case.model, case.inputs)
    assert set(watched[AttentionMass].table().layer) == {1}


def test_nothing_captured_raises(case: Case) -> None:
    with pytest.raises(RunError, match="no denoising call"), probe(case.model, AttentionMass()):
        pass
    path = find_layers(family_of(case.model), case.model)[0].path
    with pytest.raises(RunError, match="layer 0"), hidden_from(case, path), probe(case.model, AttentionMass()):
        run(case.model, case.inputs)


@contextmanager
def hidden_from(case: Case, path: str) -> Iterator[None]:
    """The first layer's attention module is skipped: as if its kernel could not be seen."""
    module = case.model.get_submodule(path)
    recorded: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, out: recorded.append(out))
    run(case.model, case.inputs)
    handle.remove()
    processor = module.processor
    module.processor = lambda *args, **kwargs: recorded[-1]
    forward, module.forward = module.__dict__.get("forward"), lambda *args, **kwargs: recorded[-1]
    try:
        yield
    finally:
        module.processor = processor
        del module.__dict__["forward"]
        if forward is not None:
            module.forward = forward


@pytest.mark.parametrize("name", sorted(name for name, of in FIXTURES.items() if of.lengths[0] != of.lengths[1]))
def test_lengths_are_per_sample_whichever_is_the_shorter(name: str) -> None:
    fixture = FIXTURES[name]
    model = fixture.build()
    lengths = fixture.lengths[::-1]
    both = fixture.inputs(2, lengths=lengths)
    with probe(model, AttentionMass(), layers=0) as watched:
        run(model, both)
    table = watched[AttentionMass].table().query("head == 0 and query == 'image' and key == 'text'")
    counts = table.n_key.tolist()
    extra = 3 if name == "hunyuan_video15" else 0
    float_mask = name == "cogview4"  # its mask adds 1 to kept keys and hides none
    assert counts == ([7, 7] if float_mask else [length + extra for length in lengths])


class Look(Observer):
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[LayerCall] = []

    def observe(self, seen: LayerCall) -> None:
        self.seen.append(seen)


@pytest.mark.parametrize("name", ["flux", "aura_flow", "hunyuan_video", "chroma"])
def test_an_edit_changes_what_it_says_and_nothing_when_neutral(name: str) -> None:
    fixture = FIXTURES[name]
    model, inputs = fixture.build(), fixture.inputs()
    before = run(model, inputs)
    with probe(model, edits=Scale("image", "text", factor=1.0)):
        assert all(torch.equal(a, b) for a, b in zip(before, run(model, inputs), strict=True))
    assert find_layers(family_of(model), model)[3].path.startswith("single")
    with probe(model, Look(), edits=Scale("image", "text", layers=[3], factor=0.0), layers=[3]) as watched:
        run(model, inputs)
    seen = watched[Look].seen[0]
    call, layout = seen.call, seen.layout
    p = reference.probabilities(call.query, call.key, call.attn_mask, call.is_causal, call.scale)
    image, text = layout.positions("image"), layout.positions("text")
    p[:, :, image, text] = 0.0
    wanted = p @ call.value.double()
    torch.testing.assert_close(seen.output.double()[:, :, image], wanted[:, :, image], atol=1e-5, rtol=0)


@contextmanager
def outputs_of(model: Any, path: str) -> Iterator[list[Tensor]]:
    """What an attention module's calls return, in the calls' own order of tokens."""
    found: list[Tensor] = []

    class Keep:
        def wants(self, module_call: Any) -> Any:
            return "call"

        def record(self, record: Any) -> None:
            found.append(record.output)

    detach = watch(model.get_submodule(path), Keep(), "record")
    try:
        yield found
    finally:
        detach()


def dense(case: Case, path: str, change: Any) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(call, row in it, image queries, output [H, Nq, D] of the explicit softmax changed by `change`) per sample.

    `change` gets the probabilities [H, queries, Nk] of the image queries and the places of the text keys, in the order
    of text positions.
    """
    layout, places = arranged(family_of(case.model).arrangement(case.inputs, case.model.config))
    for sample, (call, row, kinds) in enumerate(samples(case, path)):
        mask = None if call.attn_mask is None else call.attn_mask.expand(len(call.query), *call.attn_mask.shape[1:])
        p = reference.probabilities(
            call.query[row : row + 1], call.key[row : row + 1], None if mask is None else mask[row : row + 1],
            call.is_causal, call.scale,
        )[0]  # fmt: skip
        text = (layout.labels == TEXT).nonzero()[:, 0]
        text = text if places is None else places.keys[sample][text]
        text = text[text >= 0]
        text = text[kinds[text] == TEXT]
        queries = (kinds == IMAGE).nonzero()[:, 0] if p.shape[-2] == len(kinds) else torch.arange(p.shape[-2])
        value = call.expanded_value()[row].double()
        yield (0 if len(case.calls[path]) == 1 else sample), row, queries, change(p[:, queries], text) @ value


def test_a_blur_of_the_text_is_the_dense_blur(case: Case) -> None:
    path = joint_paths(case)[1]
    with outputs_of(case.model, path) as stock:
        run(case.model, case.inputs)
    with outputs_of(case.model, path) as found, probe(case.model, edits=Blur("image", "text", layers=[1])):
        run(case.model, case.inputs)

    def blurred(p: Tensor, text: Tensor) -> Tensor:
        matrix = blur_matrix(len(text), taps(9.0, 5))
        return p.index_copy(2, text, p[:, :, text] @ matrix.T)

    for number, row, queries, wanted in dense(case, path, blurred):
        torch.testing.assert_close(found[number][row][:, queries].double(), wanted, atol=1e-5, rtol=1e-5)
        others = torch.ones(found[number].shape[2], dtype=torch.bool)
        others[queries] = False
        assert torch.equal(found[number][row][:, others], stock[number][row][:, others])
        assert not torch.equal(found[number][row][:, queries], stock[number][row][:, queries])


def test_a_neutral_edit_is_bitwise_stock(case: Case) -> None:
    for edit in (Blur("image", "text", sigma=0.0), Scale("image", "text", factor=0.0, branches=())):
        with probe(case.model, edits=edit):
            seen = run(case.model, case.inputs)
        assert all(torch.equal(a, b) for a, b in zip(case.output, seen, strict=True))


IRREGULAR = ["lumina2", "z_image", "mochi", "hunyuan_video15", "prx", "nucleus_image"]
"""Families whose samples differ in their order of keys, or whose text is no query."""


@pytest.mark.parametrize("case", IRREGULAR, indirect=True)
def test_edits_compose_and_act_on_the_grid_of_every_sample(case: Case) -> None:
    path = joint_paths(case)[0]
    scale = Scale("image", "text", layers=[0], factor=0.25, renormalise=True)
    with outputs_of(case.model, path) as found, probe(case.model, edits=scale):
        run(case.model, case.inputs)

    def scaled(p: Tensor, text: Tensor) -> Tensor:
        p = p.index_copy(2, text, 0.25 * p[:, :, text])
        return p / p.sum(-1, keepdim=True)

    for number, row, queries, wanted in dense(case, path, scaled):
        torch.testing.assert_close(found[number][row][:, queries].double(), wanted, atol=1e-5, rtol=1e-5)
    grid = GridBlur("image", "text", layers=[0], sigma=1.0, kernel=3)
    text_blur = Blur("image", "text", layers=[0])
    with outputs_of(case.model, path) as found, probe(case.model, edits=[grid, text_blur]):
        run(case.model, case.inputs)
    space = torch.kron(blur_matrix(3, taps(1.0, 3)), blur_matrix(4, taps(1.0, 3)))
    space = torch.kron(torch.eye(case.frames).double(), space)

    def both(p: Tensor, text: Tensor) -> Tensor:
        matrix = blur_matrix(len(text), taps(9.0, 5))
        return p.index_copy(2, text, space @ p[:, :, text] @ matrix.T)

    for number, row, queries, wanted in dense(case, path, both):
        torch.testing.assert_close(found[number][row][:, queries].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["cogvideox", "hunyuan_video"], indirect=True)
def test_a_blur_of_image_keys_stays_within_each_frame(case: Case) -> None:
    path = joint_paths(case)[0]
    edit = Blur("image", "image", layers=[0], sigma=1.0, kernel=3)
    with outputs_of(case.model, path) as found, probe(case.model, edits=edit):
        run(case.model, case.inputs)
    plane = torch.kron(blur_matrix(3, taps(1.0, 3)), blur_matrix(4, taps(1.0, 3)))
    image = (arranged(family_of(case.model).arrangement(case.inputs, case.model.config))[0].labels == IMAGE).nonzero()

    def blurred(p: Tensor, text: Tensor) -> Tensor:
        block = p[:, :, image[:, 0]].unflatten(-1, (case.frames, 12))
        return p.index_copy(2, image[:, 0], (block @ plane.T).flatten(-2))

    for number, row, queries, wanted in dense(case, path, blurred):
        torch.testing.assert_close(found[number][row][:, queries].double(), wanted, atol=1e-5, rtol=1e-5)


def test_an_edit_of_queries_that_are_none_is_refused() -> None:
    model, inputs = FIXTURES["prx"].build(), FIXTURES["prx"].inputs()
    with pytest.raises(UserError, match="text tokens are no queries"), probe(model, edits=Scale("text", "image")):
        run(model, inputs)


@pytest.mark.parametrize("items", [1, 2])
def test_the_picture_that_is_edited_is_no_image_token(items: int) -> None:
    """JoyImage gets [B, items, C, frames, h, w], the image last, and puts it first."""
    model, inputs = FIXTURES["joyimage_edit"].build(), FIXTURES["joyimage_edit"].inputs(1)
    latents = torch.randn(1, items, *inputs["hidden_states"].shape[1:])
    inputs["hidden_states"] = latents
    with written_down(model) as calls:
        run(model, inputs)
        run(model, inputs | {"hidden_states": torch.cat([latents[:, :-1], latents[:, -1:] + 1.0], 1)})
    before, after = calls["double_blocks.0.attn"]
    moved = (before.value != after.value).any(3).any(1)[0]
    layout, places = arranged(family_of(model).arrangement(inputs, model.config))
    assert places is None and torch.equal(moved, layout.labels == IMAGE)
    assert layout.counts == {"image": 24, "text": 7, "other": 0, "reference": 24 * (items - 1)} and layout.frames == 2


@pytest.mark.parametrize("name", sorted(CROSS_ATTENTION))
def test_cross_attention_models_are_refused_and_told_why(name: str) -> None:
    model = CROSS_ATTENTION[name].build()
    with pytest.raises(UserError, match=r"not an MM-DiT.*(separate softmaxes|linear)"):
        probe(model, AttentionMass())


def test_no_key_of_fibo_2_is_a_text_token() -> None:
    fixture = CROSS_ATTENTION["bria_fibo2"]
    sites = taint(fixture.build(), fixture.inputs())
    kinds = {path: {kind for kind, _ in site.order()} for path, site in sites.items() if path.startswith("layers")}
    # The gist is of neither kind: it is made of the text, by attention.
    assert kinds.pop("layers.1.cross_attention") == {"text"}
    assert set(map(frozenset, kinds.values())) == {frozenset({"image", "other"})}


@pytest.mark.parametrize("name", sorted(SEVERAL_CALLS))
def test_models_with_several_calls_per_layer_are_refused_and_told_why(name: str) -> None:
    fixture = SEVERAL_CALLS[name]
    model = fixture.build()
    with torch.no_grad(), written_down(model) as calls:
        model(**fixture.inputs(1, grid=(4, 4)))
    queries = {tuple(call.query.shape[-2] for call in of) for of in calls.values()}
    assert queries == {(7, 16)}  # text, then image: no call has both
    with pytest.raises(UserError, match=r"several attention calls \(.*text"):
        probe(model, AttentionMass())


def test_conditions_of_minimax_are_no_image_tokens() -> None:
    """Keyframes are video rows too, at a noise level of their own; text rows may lie anywhere."""
    fixture = FIXTURES["minimax_h3"]
    model, inputs = fixture.build(), fixture.inputs(1)
    inputs["timestep"] = torch.tensor([0.4, 0.9])
    inputs["timestep_indices"][inputs["video_indices"][:12]] = 1
    layout, places = arranged(family_of(model).arrangement(inputs, model.config))
    assert places is None and layout.counts == {"image": 12, "text": 7, "other": 3, "reference": 12}
    assert (layout.grid, layout.frames) == ((3, 4), 1) and layout.positions("image") == slice(22, 34)
    with probe(model, AttentionMass()) as watched:
        run(model, inputs)
    table = watched[AttentionMass].table().query("layer == 0 and head == 0 and query == 'image'")
    assert dict(zip(table["key"], table["n_key"], strict=True)) == {"image": 12, "text": 7, "other": 3, "reference": 12}
    assert table["sigma"].tolist() == pytest.approx([0.6] * 4)  # the noisiest rows'
    inputs["text_indices"] = inputs["text_indices"].flip(0)
    _, places = arranged(family_of(model).arrangement(inputs, model.config))
    assert places is not None and places.keys[0, 12:19].tolist() == [6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("h", "w", "padding"), [(2, 2, 0), (2, 3, 10)])
def test_latents_of_hidream_that_are_not_square_are_padded(h: int, w: int, padding: int) -> None:
    """To 16 tokens, the most that this one takes; it packs them itself if they are not packed yet."""
    model, inputs = FIXTURES["hidream"].build(), FIXTURES["hidream"].inputs(1)
    inputs = {name: value for name, value in inputs.items() if not name.startswith(("hidden_states_", "img_"))}
    inputs["hidden_states"] = torch.randn(1, inputs["hidden_states"].shape[-1] // 4, 2 * h, 2 * w)
    with written_down(model) as calls:
        run(model, inputs)
    layout, places = arranged(family_of(model).arrangement(inputs, model.config))
    assert places is None and layout.grid == (h, w) and layout.counts["other"] == padding
    assert {call.key.shape[2] for of in calls.values() for call in of} == {layout.total}


def test_padding_of_omnigen_is_no_text() -> None:
    """Shorter prompts are padded in front: nobody but the pads sees the pads, and they see everything."""
    model, inputs = FIXTURES["omnigen"].build(), FIXTURES["omnigen"].inputs()
    inputs |= {"input_image_sizes": {}, "input_img_latents": [], "attention_mask": inputs["attention_mask"].clone()}
    inputs["attention_mask"][1, :, :3] = 0
    inputs["attention_mask"][1, :3] = 1
    with probe(model, AttentionMass()) as watched:
        run(model, inputs)
    table = watched[AttentionMass].table().query("layer == 0 and head == 0")
    longer, shorter = (table.iloc[rows].set_index(["query", "key"]) for rows in (slice(0, 6), slice(6, 12)))
    assert longer["n_key"].tolist() == [12, 1, 7] * 2 and shorter["n_key"].tolist() == [12, 4, 4] * 2
    assert shorter["n_query"].tolist() == [12] * 3 + [4] * 3
    assert shorter.loc[("text", "text"), "mass"] == pytest.approx(1, abs=1e-6)  # text comes before the image
    assert shorter.loc[("image", "text"), "mass"] < longer.loc[("image", "text"), "mass"]


def test_every_entry_has_a_fixture() -> None:
    built = {fixture.transformer for fixture in FIXTURES.values()}
    assert {family.transformer for family in FAMILIES.values()} == built
