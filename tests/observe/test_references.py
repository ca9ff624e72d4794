"""Reference pictures as keys and queries of their own, against the float64 softmax over each model's own calls. Which
token is which is found by changing one picture at a time: the value rows that move are its tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_probe.attention import reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit import Blur, GridBlur, Scale, Swap
from mmdit_probe.edit.edits import blur_matrix, taps
from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import FAMILIES, family_of
from mmdit_probe.models.layout import find_layers
from mmdit_probe.observe.contribution import Contribution
from mmdit_probe.observe.maps import JointBlocks, TextMaps
from mmdit_probe.observe.mass import AttentionMass
from mmdit_probe.observe.norms import ValueNorm
from mmdit_probe.observe.pca import PCA, Projection
from mmdit_probe.observe.probe import probe
from mmdit_probe.observe.reference_maps import ReferenceMaps
from mmdit_probe.observe.sinks import KeyMass
from tests.families import FIXTURES
from tests.observe.test_families import Look, outputs_of, run, written_down
from tests.references import CASES, Case


@functools.cache
def seen_in(name: str) -> tuple[Case, list[SDPACall], dict[str, Tensor]]:
    """A case, its joint calls in forward order, and the positions of image, text and each reference among the keys."""
    case = CASES[name]()
    paths = [layer.path for layer in find_layers(family_of(case.model), case.model)]
    text = family_of(case.model).text_input
    with written_down(case.model) as calls:
        run(case.model, case.inputs)
        for what in ("image", *range(len(case.sizes))):
            run(case.model, case.moved(what))
        changed = case.inputs[text] + 1 if text != "input_ids" else case.inputs[text].flip(1)
        run(case.model, case.inputs | {text: changed})
    first, *others = (call.expanded_value()[-1] for call in calls[paths[0]])
    names = ["image", *map(str, range(len(case.sizes))), "text"]
    rows = {of: (value != first).any(2).any(0).nonzero()[:, 0] for of, value in zip(names, others, strict=True)}
    if text == "input_ids":  # an id may be what it was
        taken = torch.cat([rows[of] for of in names[:-1]]).tolist()
        rows["text"] = torch.tensor([p for p in range(case.inputs[text].shape[1]) if p not in taken])
    if (mask := calls[paths[0]][0].attn_mask) is not None and mask.dtype == torch.bool:
        rows["text"] = rows["text"][mask[-1].any((0, 1))[rows["text"]]]
    return case, [calls[path][0] for path in paths], rows


def dense(call: SDPACall) -> Tensor:
    """Probabilities [H, N, N] float64 of the last sample."""
    mask = None if call.attn_mask is None else call.attn_mask.expand(len(call.query), *call.attn_mask.shape[1:])[-1:]
    return reference.probabilities(call.query[-1:], call.key[-1:], mask, call.is_causal, call.scale)[0]


def last(table: Any, **where: Any) -> Any:
    """Rows of the last sample, which come last among rows that are otherwise alike."""
    names = [name for name in ("layer", "head", "query", "key", "token", "span", "stream") if name in table]
    kept = table.groupby(names, observed=True).tail(1)
    for name, value in where.items():
        kept = kept[kept[name] == value]
    return kept


@pytest.mark.parametrize("name", sorted(CASES))
def test_masses_and_norms_are_those_of_each_picture(name: str) -> None:
    case, calls, rows = seen_in(name)
    stock = run(case.model, case.inputs)
    with probe(case.model, AttentionMass(), ValueNorm()) as watched:
        seen = run(case.model, case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(stock, seen, strict=True))
    table, norms = watched[AttentionMass].table(), watched[ValueNorm].table()
    assert set(table["query"]) == {"image", "text", "reference"}
    numbers = [str(number) for number in range(len(case.sizes))]
    assert [len(rows[number]) for number in numbers] == [f * h * w for f, h, w in case.sizes]
    every = torch.cat([rows[number] for number in numbers]).sort().values
    for layer, call in enumerate(calls):
        p = dense(call)
        value = call.expanded_value()[-1].double().transpose(0, 1).flatten(1).norm(dim=-1)
        for query, asked in (("image", rows["image"]), ("text", rows["text"]), ("reference", every)):
            part = last(table, layer=layer, query=query)
            assert (part.groupby("head")["mass"].sum() - 1).abs().max() < 1e-5
            assert set(part["n_query"]) == {len(asked)}
            for key, span, columns in (
                ("image", None, rows["image"]), *(("reference", number, rows[number]) for number in numbers),
                ("text", None, rows["text"]),
            ):  # fmt: skip
                own = part[(part["key"] == key) & ((part["span"] == span) | (span is None))]
                wanted = p[:, asked][:, :, columns].sum(-1).mean(1)
                found = torch.tensor(own.groupby("head")["mass"].sum().to_numpy(float))
                torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)
                assert set(own.groupby("head")["n_key"].sum()) == {len(columns)}
        for number in numbers:
            own = last(norms, layer=layer, token="reference", span=number, head=-1)
            assert own["norm"].item() == pytest.approx(float(value[rows[number]].mean()), rel=1e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_maps_between_image_and_reference(name: str) -> None:
    case, calls, rows = seen_in(name)
    layer, number = len(calls) - 1, len(case.sizes) - 1
    frames, h, w = case.sizes[number]
    space = (h, w) if frames == 1 else (frames, h, w)
    corner = torch.zeros(h, w, dtype=torch.bool)
    corner[h - 1, : max(1, w - 1)] = True
    reads = ReferenceMaps([(2, 1), (0, 1, 2, 4)], reference=number, heads="all")

    class Back(ReferenceMaps):
        pass

    back = Back([corner], within="reference", reference=number, heads="all")
    over = TextMaps(heads="all", reference=number)
    with probe(case.model, reads, back, over, layers=[layer]):
        run(case.model, case.inputs)
    p = dense(calls[layer])
    image, own = rows["image"], rows[str(number)]
    block = p[:, image][:, :, own]  # [H, I, R]
    frame = torch.arange(len(image)).reshape(-1, 3, 4)
    for column, region in enumerate((frame[:, 2, 1].flatten(), frame[:, 0:2, 1:4].flatten())):
        found = reads.maps(layer, branch=None)[-1][..., column]
        assert found.shape[1:] == space
        torch.testing.assert_close(found.flatten(1).double(), block[:, region].mean(1), atol=2e-6, rtol=0)
    wanted = block[:, :, corner.flatten().repeat(frames)].sum(-1)
    found = back.maps(layer, branch=None)[-1][..., 0]
    torch.testing.assert_close(found.flatten(1).double(), wanted, atol=2e-6, rtol=0)
    words = over.maps(layer, branch=None)[-1]
    assert words.shape[1:-1] == space
    wanted = p[:, own][:, :, rows["text"]]
    torch.testing.assert_close(words.flatten(1, -2).double()[..., : wanted.shape[-1]], wanted, atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "joyimage_edit_plus", "omnigen"])
def test_single_keys_blocks_and_components_of_a_reference(name: str) -> None:
    case, calls, rows = seen_in(name)
    number = len(case.sizes) - 1
    blocks, basis = JointBlocks([1], ("i2t", "feat_out"), reference=number), PCA(("value",), 3, reference=number)
    with probe(case.model, blocks, basis, KeyMass(), layers=[1]) as watched:
        run(case.model, case.inputs)
    p, own = dense(calls[1]), rows[str(number)]
    found = blocks.kept[1]["i2t"][-1][..., : len(rows["text"])]
    torch.testing.assert_close(found.double(), p[:, own][:, :, rows["text"]], atol=3e-6, rtol=0)
    values = calls[1].expanded_value()[:, :, own].double().transpose(1, 2).flatten(2)
    mean, vectors, _ = basis.basis(1, "value")
    torch.testing.assert_close(mean, values.flatten(0, 1).mean(0), atol=1e-5, rtol=0)
    _, h, w = case.sizes[number]
    with probe(case.model, Projection(basis), layers=[1]) as projected:
        run(case.model, case.inputs)
    maps = projected[Projection].maps(1, "value")
    assert maps.shape == (len(values), h, w, 3)
    torch.testing.assert_close(maps.flatten(1, 2).double(), (values - mean) @ vectors, atol=1e-4, rtol=0)
    keys = watched[KeyMass].table()
    keys = keys[(keys["query"] == "reference") & (keys["head"] == 0)].tail(p.shape[-1])
    every = torch.cat([rows[str(n)] for n in range(len(case.sizes))])
    wanted = p[0, every].mean(0)[rows["image"]].tolist()
    assert keys[keys["token"] == "image"]["mass"].tolist() == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_what_a_reference_writes_into_the_image(name: str) -> None:
    case, calls, rows = seen_in(name)
    with probe(case.model, Contribution(), layers=[0]) as watched:
        run(case.model, case.inputs)
    table = watched[Contribution].table().query("head == -1")
    module: Any = case.model.get_submodule(find_layers(family_of(case.model), case.model)[0].path)
    weight, call = module.to_out[0].weight.detach().double(), calls[0]
    p, value = dense(call)[:, rows["image"]], call.expanded_value()[-1].double()
    for number in range(len(case.sizes)):
        own = rows[str(number)]
        update = (p[:, :, own] @ value[:, own]).transpose(0, 1).flatten(1) @ weight.T
        row = table[(table["key"] == "reference") & (table["span"] == str(number))].iloc[-1]
        assert row["norm"] == pytest.approx(float(update.norm(dim=-1).mean()), rel=1e-4)
        assert row["n_key"] == len(own)
    whole = table[table["span"] == "all"].groupby("key", observed=True).tail(1).set_index("key")
    assert whole.drop("all")["share"].sum() + 0.0 == pytest.approx(whole.loc["all", "share"], abs=1e-4)
    assert whole.drop("all")["mass"].sum() == pytest.approx(1, abs=1e-5)


def edited(name: str, edits: Any, layer: int = 1) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Output [H, N, D] of a layer under edits, its stock probabilities and values [H, N, D], and who is where."""
    case, calls, rows = seen_in(name)
    path = find_layers(family_of(case.model), case.model)[layer].path
    with outputs_of(case.model, path) as found, probe(case.model, edits=edits):
        run(case.model, case.inputs)
    return found[0][-1].double(), dense(calls[layer]), calls[layer].expanded_value()[-1].double(), rows  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "joyimage_edit_plus", "hunyuan_video_framepack"])
def test_a_blur_of_reference_keys_is_over_each_picture_s_own_grid(name: str) -> None:
    blur = Blur("image", "reference", layers=[1], sigma=1.0, kernel=3)
    output, p, value, rows = edited(name, blur)  # type: ignore[misc]
    for number, (frames, h, w) in enumerate(CASES[name]().sizes):
        grid = torch.kron(*(blur_matrix(side, taps(1.0, 3)) for side in (h, w)))
        own, matrix = rows[str(number)], torch.kron(torch.eye(frames).double(), grid)
        p[:, rows["image"][:, None], own] = p[:, rows["image"]][:, :, own] @ matrix.T
    torch.testing.assert_close(output[:, rows["image"]], (p @ value)[:, rows["image"]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[:, rows["text"]], (p @ value)[:, rows["text"]], atol=1e-5, rtol=1e-5)


def test_edits_of_one_reference_and_of_reference_queries() -> None:
    output, p, value, rows = edited("flux2", Scale("text", "reference", layers=[1], references=[1]))  # type: ignore[misc]
    p[:, rows["text"][:, None], rows["1"]] = 0.0
    torch.testing.assert_close(output, p @ value, atol=1e-5, rtol=1e-5)
    output, p, value, rows = edited("flux2", GridBlur("reference", "text", layers=[1], sigma=1.0, kernel=3))  # type: ignore[misc]
    for number, (_, h, w) in enumerate(CASES["flux2"]().sizes):
        space, own = torch.kron(*(blur_matrix(side, taps(1.0, 3)) for side in (h, w))), rows[str(number)]
        p[:, own[:, None], rows["text"]] = space @ p[:, own][:, :, rows["text"]]
    torch.testing.assert_close(output, p @ value, atol=1e-5, rtol=1e-5)


def test_two_references_are_exchanged() -> None:
    """JoyImage's are of one size; pictures of two sizes are refused."""
    swap = Swap("image", "reference", layers=[1], references=(0, 1))
    output, p, value, rows = edited("joyimage_edit", swap)  # type: ignore[misc]
    first, second = rows["0"], rows["1"]
    swapped = p.clone()
    swapped[:, rows["image"][:, None], first] = p[:, rows["image"]][:, :, second]
    swapped[:, rows["image"][:, None], second] = p[:, rows["image"]][:, :, first]
    torch.testing.assert_close(output, swapped @ value, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="differ in size"):
        edited("flux2", swap)
    with pytest.raises(UserError, match="numbers of two"):
        Swap("image", "reference", references=(1,))
    with pytest.raises(UserError, match=r"no reference 2: .* has 2"):
        edited("flux2", Scale("image", "reference", references=[2]))
    with pytest.raises(UserError, match="references select reference keys"):
        Scale("image", "text", references=[0])


def test_samples_with_other_references_have_rows_of_their_own() -> None:
    """JoyImage Edit Plus: one sample with two references, one without."""
    fixture = FIXTURES["joyimage_edit_plus"]
    model, inputs = fixture.build(), fixture.inputs(2)
    more = torch.randn(2, 7, *inputs["hidden_states"].shape[2:])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], more], 1)
    inputs["shape_list"] = [[(1, 3, 4)], [(1, 3, 4), (1, 2, 2), (1, 1, 3)]]
    path = find_layers(family_of(model), model)[0].path
    with written_down(model) as calls, probe(model, AttentionMass(), Look(), layers=[0]) as watched:
        run(model, inputs)
    table = watched[AttentionMass].table().query("head == 0")
    p = dense(calls[path][0])[0]
    wanted = {"0": p[:12, 12:16].sum(1).mean(), "1": p[:12, 16:19].sum(1).mean()}
    found = table[(table["query"] == "image") & (table["key"] == "reference")].set_index("span")["mass"].to_dict()
    assert found == pytest.approx({name: float(mass) for name, mass in wanted.items()}, abs=2e-6)
    assert (table["query"] == "reference").sum() == len(set(table["span"]) - {"all"}) + 2
    seen = watched[Look].seen[0]
    with pytest.raises(UserError, match="no reference 0: the samples of this call have 0"):
        seen.picture(0)


def test_a_call_without_references_has_no_rows_of_them() -> None:
    model, inputs = FIXTURES["flux"].build(), FIXTURES["flux"].inputs()
    with probe(model, AttentionMass(), ValueNorm(), Look(), layers=0) as watched:
        run(model, inputs)
    assert "reference" not in {*watched[AttentionMass].table()["key"], *watched[AttentionMass].table()["query"]}
    assert "reference" not in set(watched[ValueNorm].table()["token"])
    with pytest.raises(UserError, match="no reference tokens"), probe(model, edits=Scale("image", "reference")):
        run(model, inputs)
    with pytest.raises(UserError, match="no reference 0"), probe(model, ReferenceMaps(), layers=0):
        run(model, inputs)


def test_regions_that_are_no_part_of_a_picture_are_refused() -> None:
    case = CASES["flux"]()
    for region in ((3, 0), (0, 0, 4, 4), (1, 1, 1, 2), torch.zeros(3, 4), torch.ones(2, 2)):
        with pytest.raises(UserError, match="region"), probe(case.model, ReferenceMaps([region]), layers=0):  # type: ignore[list-item]
            run(case.model, case.inputs)


def test_references_without_a_grid_are_counted_and_have_no_maps() -> None:
    case = CASES["flux"]()
    ids = case.inputs["img_ids"].clone()
    ids[-1] = torch.tensor([1.0, 7.0, 9.0])  # two pictures under one number
    with probe(case.model, AttentionMass(), layers=0) as watched:
        run(case.model, case.inputs | {"img_ids": ids})
    table = watched[AttentionMass].table()
    assert set(table[table["key"] == "reference"]["n_key"]) == {10}
    with pytest.raises(UserError, match="no known grid"), probe(case.model, ReferenceMaps(), layers=0):
        run(case.model, case.inputs | {"img_ids": ids})


def test_pictures_that_are_made_together_are_no_references() -> None:
    """VisualCloze fills several pictures, its transformer has more channels in than out."""
    case = CASES["flux"]()
    config = type("Config", (), {"in_channels": 12, "out_channels": 4})
    with pytest.raises(UserError, match="2 pictures of this call are denoised together"):
        FAMILIES["flux"].arrangement(case.inputs, config)


def test_references_that_a_probe_does_not_see_are_refused() -> None:
    """Keys from a cache, and pictures among several texts."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    case = CASES["flux2"]()
    with pytest.raises(UserError, match="Flux2KleinKVPipeline"), probe(case.model, AttentionMass()):
        case.model(**case.inputs, kv_cache_mode="extract", num_ref_tokens=12)
    glm, caches = FIXTURES["glm_image"], GlmImageKVCache(num_layers=2)
    model, inputs = glm.build(), glm.inputs(1)
    for mode in (None, "skip"):
        caches.set_mode(mode)
        with probe(model, AttentionMass(), layers=0):
            model(**inputs, kv_caches=caches)
    caches.set_mode("write")
    with pytest.raises(UserError, match="from a cache"), probe(model, AttentionMass()):
        model(**inputs, kv_caches=caches)
    z = FIXTURES["z_image"].inputs(1)
    with pytest.raises(UserError, match="ZImageOmniPipeline"):
        FAMILIES["z_image"].arrangement(z | {"x": [z["x"]], "cap_feats": [z["cap_feats"]]}, None)
