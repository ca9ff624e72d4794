"""Capture against the explicit softmax, the concept stream against a hand-run block, on tiny random pipelines."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_probe.attention.reference import probabilities as explicit
from mmdit_probe.data import Fit, parse_classes
from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.concepts import ConceptStream
from mmdit_probe.observe.maps import JointBlocks, second_attention, second_eigenvalue
from mmdit_probe.observe.observer import LayerCall, Observer
from mmdit_probe.observe.probe import probe
from mmdit_probe.segment.capture import PictureReader, Request, capture, concept_embeddings
from mmdit_probe.segment.methods import METHODS
from mmdit_probe.segment.record import Reading
from mmdit_probe.segment.rows import RowLimit
from mmdit_probe.segment.run import discover, segment
from tests import pipelines, tiny


class Keep(Observer):
    """Keeps every call, for the tests to compute from."""

    def __init__(self) -> None:
        self.calls: dict[int, LayerCall] = {}

    def observe(self, seen: LayerCall) -> None:
        self.calls[seen.layer.index] = seen


@pytest.fixture
def model(pipe) -> MMDiT:
    return MMDiT(pipe)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)


def test_parts_are_slices_of_the_explicit_softmax(model: MMDiT, picture: np.ndarray) -> None:
    blocks, keep = JointBlocks([0, 2], ("i2t", "i2i", "i2i_walk", "feat_out", "feat_proj")), Keep()
    latents = model.encode_image(np.ascontiguousarray(picture[:48, :64]))
    with probe(model, blocks, keep):
        model.denoise(model.noise(latents, 0.5, 0), 0.5, model.encode_prompt("a red ring"))
    for layer in (0, 2):
        call = keep.calls[layer]
        image, text = call.layout.positions("image"), call.layout.positions("text")
        full = explicit(call.call.query, call.call.key)  # [B, H, N, N]
        kept = blocks.kept[layer]
        assert torch.allclose(kept["i2t"], full[:, :, image, text].float(), atol=1e-6)
        assert torch.allclose(kept["i2i"], full[:, :, image, image].mean(1).float(), atol=1e-6)
        walk = full[:, :, image, image].float()
        walk = walk / walk.sum(-1, keepdim=True)
        weights = torch.linalg.eigvals(walk[0].double()).abs().sort(-1).values[:, -2].float()
        want = (walk[0] * weights[:, None, None]).sum(0) / weights.sum()
        assert torch.allclose(kept["i2i_walk"][0], want, atol=1e-4)
        out = call.output[:, :, image].transpose(1, 2).flatten(2)
        assert torch.allclose(kept["feat_out"], out)
        assert torch.allclose(kept["feat_proj"], call.layer.module.to_out[0](out))
    assert set(blocks.kept) == {0, 2}


def test_second_eigenvalue() -> None:
    chain = torch.block_diag(torch.full((3, 3), 1 / 3), torch.full((3, 3), 1 / 3))  # two closed groups: 1
    mixed = torch.full((6, 6), 1 / 6)  # forgets at once: 0
    values = second_eigenvalue(torch.stack([chain, mixed]))
    assert values.tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


def test_a_chain_has_the_same_second_eigenvalue_in_every_batch() -> None:
    """Each place of a batch had a start of its own, and 40 rounds do not forget it where eigenvalues lie close."""
    chain = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    values = second_eigenvalue((chain / chain.sum(-1, keepdim=True)).expand(3, -1, -1))
    assert values.amax() - values.amin() < 1e-6 < values.amin()


@pytest.mark.parametrize("variant", ["sd3", "sd35"])
def test_concept_stream_equals_a_prompt_that_only_concepts_read(variant: str) -> None:
    """Concepts that ARE the prompt's tokens must do as the text stream does, as long as text attends to both."""
    model = MMDiT(tiny.pipeline(variant))
    latents = model.noise(torch.randn(1, 4, 8, 8), 0.5, 0)
    text = model.encode_prompt("a red ring")
    stream, keep = ConceptStream(model, text.prompt_embeds[0]), Keep()
    plain = model.denoise(latents, 0.5, text)
    with probe(model, stream, keep), stream.listening():
        observed = model.denoise(latents, 0.5, text)
    assert torch.equal(plain, observed)
    for layer, call in keep.calls.items():
        own = call.output[:, :, call.layout.positions("text")].transpose(1, 2).flatten(2)
        assert torch.allclose(stream.outputs[layer], own, atol=1e-4), layer


def test_capture_averages_seeds_and_levels(model: MMDiT, picture: np.ndarray) -> None:
    classes = parse_classes("red ring, cat")
    both = capture(model, picture, classes, Reading(layers="0", sigmas=(0.3, 0.6), seeds=(0, 1)))
    single = [
        capture(model, picture, classes, Reading(layers="0", sigmas=(s,), seeds=(k,))).mean("i2t")
        for s in (0.3, 0.6)
        for k in (0, 1)
    ]
    assert torch.allclose(both.mean("i2t"), torch.stack(single).mean(0), atol=1e-7)
    assert not torch.allclose(single[0], single[1])
    again = capture(model, picture, classes, Reading(layers="0", sigmas=(0.3,))).mean("i2t")
    assert torch.equal(again, single[0])


def test_long_vocabularies_use_several_prompts(model: MMDiT, picture: np.ndarray) -> None:
    names = "red ring, cat, ring, red, cat ring, red cat, ring cat, cat red"
    result = segment(model, picture, names, Reading(layers="all"))
    assert len(result.capture.passes) > 1
    assert len(result.probabilities) == 8 and torch.isfinite(result.probabilities).all()
    assert result.labels.shape == (50, 70)
    assert sum(area["pixels"] for area in result.areas().values()) == 50 * 70


def test_concepts_are_read_alone(model: MMDiT) -> None:
    one = concept_embeddings(model, ["cat"])
    both = concept_embeddings(model, ["red ring", "cat"])
    assert torch.allclose(one[0], both[1], atol=1e-5) and not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("fit", ["letterbox", "crop", "aspect"])
def test_discover_any_aspect(model: MMDiT, picture: np.ndarray, fit: str) -> None:
    result = discover(model, picture, Reading(layers="0-1", fit=fit), options={"tau": 0.0})
    assert result.labels.shape == (50, 70)
    assert result.names[0] == "segment 1" and len(result.names) >= 1
    unseen = result.labels == result.UNLABELLED
    assert np.array_equal(unseen, result.capture.fit.unseen)


def test_second_attention_is_the_image_only_softmax_of_dual_blocks(model: MMDiT, picture: np.ndarray) -> None:
    dual = MMDiT(tiny.pipeline("sd35"))
    inputs = {}
    module = dual.transformer.transformer_blocks[1].attn2
    handle = module.register_forward_hook(
        lambda m, a, kw, out: inputs.update(hidden=kw["hidden_states"], out=out), with_kwargs=True
    )
    found = capture(dual, picture, [], Reading(layers="0-1", size=(32, 48)), keep=("i2i_attn2", "i2i"))
    handle.remove()
    record = found.passes[0].records[1]
    block = record.part("i2i_attn2")
    assert torch.allclose(block.sum(-1), torch.ones(len(block)), atol=1e-5)
    assert (record.part("i2i").sum(-1) < 1.0).all()
    hidden = inputs["hidden"]
    query, key, value = (getattr(module, name)(hidden).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                         for name in ("to_q", "to_k", "to_v"))  # fmt: skip
    query, key = module.norm_q(query), module.norm_k(key)
    chances = explicit(query, key)
    assert torch.allclose(block, chances[0].mean(0).float(), atol=1e-6)
    own = module.to_out[0]((chances.float() @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(own, inputs["out"], atol=1e-5)  # the map is the one that the module itself applied
    with pytest.raises(UserError, match=r"layers \[2\] have no second.*\[0, 1\]"):
        capture(dual, picture, [], Reading(layers="2"), keep=("i2i_attn2",))
    with pytest.raises(UserError, match="its blocks are not dual"):
        discover(model, picture, method="diffseg", options={"i2i": "attn2"})


def test_the_mean_over_heads_is_all_that_most_methods_read(model: MMDiT, picture: np.ndarray) -> None:
    classes, reading = parse_classes("red ring, cat"), Reading(layers="all")
    parts = ("i2t", "i2t_logit")
    whole, mean = (capture(model, picture, classes, reading, keep=parts, heads_apart=apart) for apart in (True, False))
    for softmax, apart in (("joint", False), ("logit", False), ("text", True), ("image-odds", True)):
        method = METHODS["seg4diff"].configure({"softmax": softmax})
        assert method.reads_heads == apart
        assert torch.allclose(method(whole), method(mean), atol=1e-6) == (not apart), softmax
    assert METHODS["seg4diff"].configure({"heads": [0]}).reads_heads and not METHODS["iseg"].reads_heads
    assert mean.passes[0].records[0].part("i2t").shape == (1, *whole.passes[0].records[0].part("i2t").shape[1:])


def test_logits_are_the_scaled_products_before_the_softmax(model: MMDiT, picture: np.ndarray) -> None:
    blocks, keep = JointBlocks([1], ("i2t_logit",)), Keep()
    latents = model.encode_image(np.ascontiguousarray(picture[:48, :64]))
    with probe(model, blocks, keep):
        model.denoise(model.noise(latents, 0.5, 0), 0.5, model.encode_prompt("a red ring"))
    call, layout = keep.calls[1].call, keep.calls[1].layout
    query, key = call.query[:, :, layout.positions("image")].double(), call.key[:, :, layout.positions("text")].double()
    want = query @ key.mT / call.query.shape[-1] ** 0.5
    assert (blocks.kept[1]["i2t_logit"] - want).abs().max() < 1e-4


def test_methods_read_the_same_from_the_columns_they_need(model: MMDiT, picture: np.ndarray) -> None:
    classes, reading, parts = parse_classes("red ring, cat"), Reading(layers="all"), ("i2t", "i2t_logit", "i2i")
    whole, words = (capture(model, picture, classes, reading, keep=parts, text_kinds=k) for k in (None, ("word",)))
    record, few = whole.passes[0].records[0], words.passes[0].records[0]
    spans = [place for query in whole.passes[0].prompt.queries for place in query.positions()]
    assert few.part("i2t").shape[-1] == len(spans) + 1 < record.part("i2t").shape[-1]
    assert torch.allclose(few.part("i2t").sum(-1), record.part("i2t").sum(-1), atol=1e-6)
    assert torch.allclose(few.part("i2t_logit").logsumexp(-1), record.part("i2t_logit").logsumexp(-1), atol=1e-5)
    for name in ("seg4diff", "diffsegmenter"):
        for softmax in ("joint", "text", "image-odds", "words", "logit"):
            method = METHODS[name].configure({"softmax": softmax})
            assert method.text_kinds == ("word",) and torch.allclose(method(words), method(whole), atol=1e-5), softmax
    assert METHODS["iseg"].text_kinds is None
    blind, pads = (capture(model, picture, [], reading, text_kinds=kinds) for kinds in (None, ("pad", "eos")))
    method = METHODS["seg4diff-unsup"]
    assert method.text_kinds == ("pad", "eos") and torch.allclose(method(pads), method(blind), atol=1e-6)
    assert method.configure({"kinds": "all"}).text_kinds is None


def alone(model: MMDiT, request: Request, text: str, part: str, layer: int) -> torch.Tensor:
    """A part of a layer's record by whole forwards of one row each, without a reader."""
    latents, found = model.encode_image(Fit.of(request.image.shape[:2], (64, 64)).apply(request.image)), []
    for sigma, seed in itertools.product(request.reading.sigmas, request.reading.seeds):
        blocks = JointBlocks([layer], [part])
        with probe(model, blocks, layers=[layer]):
            model.denoise(model.noise(latents, sigma, seed), sigma, model.encode_prompt(text))
        found.append(blocks.kept[layer][part][0])
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("rows", [1, 3, None])
def test_pictures_read_together_are_what_they_are_alone(model: MMDiT, picture: np.ndarray, rows: int | None) -> None:
    other, levels = picture[::-1].copy(), Reading(layers="0-1", sigmas=(0.3, 0.6), seeds=(0, 1))
    named = Request(picture, parse_classes("red ring, cat"), levels)
    asked = [
        named,
        Request(other, parse_classes("cat"), Reading(layers="0-1")),
        Request(picture, [], Reading(layers="1"), keep=("i2i", "feat_proj")),
        Request(other, [], Reading(layers="0-1"), keep=("i2t", "i2i")),
    ]
    texts = ("red ring cat", "cat", "", "")
    calls: list[int] = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    found = PictureReader(model, rows)(asked)
    assert sum(calls) == 4 + 1 + 1 + 1 and max(calls) == {1: 1, 3: 3, None: 5}[rows]
    for request, text, one in zip(asked, texts, found, strict=True):
        assert one.image is request.image and one.passes[0].prompt.text == text
        for layer, part in itertools.product(one.layers, request.keep):
            want = alone(model, request, text, part, layer)
            assert torch.allclose(one.passes[0].records[layer].part(part), want, atol=1e-5)


def test_texts_and_shared_pictures_are_encoded_once(model: MMDiT, picture: np.ndarray, monkeypatch) -> None:
    texts, pictures = [], []
    encode_prompt, encode_image = model.encode_prompt, model.encode_image
    monkeypatch.setattr(model, "encode_prompt", lambda some: texts.extend(some) or encode_prompt(some))
    monkeypatch.setattr(model, "encode_image", lambda some: pictures.extend(some) or encode_image(some))
    classes, reading = parse_classes("cat"), Reading(layers="0")
    read = PictureReader(model)
    for _ in range(2):
        read(
            [Request(picture, classes, reading), Request(picture, [], reading), Request(picture + 1, classes, reading)]
        )
    assert sorted(texts) == ["", "cat"] and len(pictures) == 2 * 2


def test_prompts_of_other_lengths_do_not_share_a_forward(picture: np.ndarray) -> None:
    """Where prompts are not padded, a longer neighbour would add text positions to a shorter one."""
    model = MMDiT(pipelines.build("qwen_image"))
    assert not model.family.fixed_length
    asked = [Request(picture, parse_classes(text), Reading(layers="0")) for text in ("cat", "cat, red house", "cat")]
    both, read = PictureReader(model)(asked), [PictureReader(model)([one])[0] for one in asked]
    for one, single in zip(both, read, strict=True):
        assert torch.allclose(one.mean("i2t"), single.mean("i2t"), atol=1e-6)
        assert one.mean("i2t").shape[-1] == len(model.token_tables(one.passes[0].prompt.text)[0])


def test_a_forward_that_does_not_fit_is_halved_and_nothing_is_read_twice(model: MMDiT) -> None:
    done: list[int] = []

    def forward(rows: list[int]) -> None:
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        done.extend(rows)

    RowLimit(model, 8).run(range(11), forward, "kind", tokens=20)
    assert done == list(range(11))
    with pytest.raises(torch.OutOfMemoryError):
        RowLimit(model, 1).run([0], lambda rows: forward([0, 0, 0]), "kind", tokens=20)


def test_a_gpu_is_filled_after_one_row_was_measured(model: MMDiT, monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    for name, value in {
        "mem_get_info": (1000, 2000), "memory_reserved": 300, "memory_allocated": 200, "max_memory_allocated": 300,
        "reset_peak_memory_stats": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    limit = RowLimit(model)
    assert limit.pictures == 1
    limit.run(range(20), lambda rows: taken.append(len(rows)), "kind", tokens=20)
    assert taken == [1, 8, 8, 3] and limit.pictures == 8  # 0.8 x (1000 + 300 - 200) bytes at 300 - 200 each


def test_second_attention_of_layers_from_an_iterator() -> None:
    dual = MMDiT(tiny.pipeline("sd35"))
    with second_attention(dual, iter([0, 1])) as kept:
        dual.denoise(torch.randn(1, 4, 8, 8), 0.5, dual.encode_prompt("a cat"))
    assert sorted(kept) == [0, 1]


def test_second_attention_is_computed_in_float32_under_autocast() -> None:
    dual = MMDiT(tiny.pipeline("sd35"))
    module = dual.transformer.transformer_blocks[0].attn2
    with torch.no_grad():
        module.norm_q.weight.mul_(3.0)  # logits of some size, whose rounding is seen
    given: list[Any] = []
    handle = module.register_forward_hook(lambda m, a, kw, out: given.append(kw["hidden_states"]), with_kwargs=True)
    text = dual.encode_prompt("a cat")
    with torch.autocast("cpu", torch.bfloat16), second_attention(dual, [0]) as kept:
        dual.denoise(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 0.5, text)
        query, key = (
            of(given[0]).unflatten(-1, (module.heads, -1)).transpose(1, 2) for of in (module.to_q, module.to_k)
        )
        query, key = module.norm_q(query), module.norm_k(key)
    handle.remove()
    expected = explicit(query, key)[0].mean(0)
    torch.testing.assert_close(kept[0][0].double(), expected, atol=1e-5, rtol=0)
