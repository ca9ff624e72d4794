"""Every method on captures whose answer is known, with negative controls."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.scores import assign, histogram
from mmdit_probe.segment.methods import METHODS, find
from mmdit_probe.segment.methods.clusters import normalised_cuts
from mmdit_probe.segment.methods.seg4diff import greedy_merge, symmetric_kl
from mmdit_probe.segment.settings import split_option
from mmdit_probe.segment.tail import label
from tests.segment import worlds

NAMED = [name for name, one in METHODS.items() if not one.unsupervised and "clip" not in name]
BLIND = [name for name, one in METHODS.items() if one.unsupervised]
THRESHOLDS = {"seg4diff-unsup": 0.02, "diffseg": 0.5, "diffcut": 0.5}


def accuracy(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found == truth).mean())


@pytest.mark.parametrize("name", NAMED)
def test_named_methods_find_known_regions(name: str) -> None:
    regions = worlds.masks()
    one = worlds.capture(regions, noise=0.2)
    scores = find(name)(one)
    assert tuple(scores.shape) == (3, 8, 8) and torch.isfinite(scores).all()
    assert accuracy(label(one.fit.back(scores)), worlds.truth(regions)) > 0.9
    control = find(name)(worlds.without_information(one))
    assert accuracy(label(one.fit.back(control)), worlds.truth(regions)) < 0.7


@pytest.mark.parametrize("name", BLIND)
def test_unsupervised_methods_find_known_regions(name: str) -> None:
    regions = worlds.masks()
    one = worlds.capture(regions, noise=0.05, empty=True, text=4)
    method = find(name).configure({"tau": THRESHOLDS[name]})

    def score(capture) -> tuple[float, int]:
        labels = label(one.fit.back(method(capture)))
        counts = histogram(worlds.truth(regions), labels, 3)
        classes = assign(counts)
        return accuracy(classes[labels], worlds.truth(regions)), len(np.unique(labels))

    right, segments = score(one)
    assert right > 0.9 and 3 <= segments <= 4
    assert score(worlds.without_information(one))[0] < right - 0.2


@pytest.mark.parametrize("name", BLIND)
def test_threshold_zero_keeps_and_huge_merges(name: str) -> None:
    one = worlds.capture(worlds.masks(), noise=0.05, empty=True)
    low, high = (find(name).configure({"tau": tau})(one) for tau in (0.0, 1e9))
    if name == "diffcut":
        low, high = high, low  # there tau is the value below which parts are cut
    assert len(high) == 1 < len(low)


def test_synonyms_take_the_better_map() -> None:
    from mmdit_probe.data import SegClass

    one = worlds.capture(worlds.masks())
    queries = one.passes[0].prompt.queries
    merged = tuple(replace(q, of_class=min(q.of_class, 1)) for q in queries)
    one.passes[0] = replace(one.passes[0], prompt=replace(one.passes[0].prompt, queries=merged))
    one.classes = [SegClass(("thing0",)), SegClass(("thing1", "thing2"))]
    scores = find("seg4diff")(one)
    assert len(scores) == 2
    truth = worlds.masks().argmax(0).clamp(max=1)
    assert torch.equal(scores.argmax(0), truth)


def test_layers_and_heads_are_those_asked_for() -> None:
    one = worlds.capture(worlds.masks())
    for record in one.passes[0].records.values():
        record.i2t[1] = record.i2t[1].flip(0)  # head 1 is wrong
    right = find("seg4diff").configure({"heads": [0]})(one).argmax(0)
    wrong = find("seg4diff").configure({"heads": [1]})(one).argmax(0)
    truth = worlds.masks().argmax(0)
    assert torch.equal(right, truth) and not torch.equal(wrong, truth)
    chosen = find("seg4diff").configure({"heads": {0: [0], 1: [0]}})(one)
    assert torch.equal(chosen.argmax(0), truth)
    with pytest.raises(UserError, match=r"head 2 does not exist: there are 2 heads"):
        find("seg4diff").configure({"heads": [2]})(one)


def test_softmax_variants_differ_by_the_mass_they_divide_by() -> None:
    one = worlds.capture(worlds.masks(), layers=(0,))
    i2t = one.passes[0].records[0].i2t.mean(0)
    joint, text, odds = (
        find("seg4diff").configure({"softmax": mode})(one).flatten(1) for mode in ("joint", "text", "image-odds")
    )
    assert torch.allclose(joint[0], i2t[:, 1])
    assert torch.allclose(text[0], (i2t[:, 1] / i2t.sum(1)), atol=1e-6)
    assert torch.allclose(odds[0], i2t[:, 1] / (1 - i2t.sum(1)), atol=1e-6)


def test_image_odds_do_not_depend_on_the_other_words() -> None:
    """A column over the image mass is the same whatever else is in the text: what makes prompts comparable."""
    logits = torch.randn(6, 4 + 3)
    long, short = logits.softmax(1), logits[:, :5].softmax(1)
    odds = [a[:, 4] / a[:, :4].sum(1) for a in (long, short)]
    assert torch.allclose(*odds, atol=1e-6) and not torch.allclose(long[:, 4], short[:, 4])


def test_symmetric_kl_against_its_definition() -> None:
    p, q = torch.rand(3, 9).softmax(1), torch.rand(4, 9).softmax(1)
    want = 0.5 * ((p[:, None] - q[None]) * (p[:, None].log() - q[None].log())).sum(-1)
    assert torch.allclose(symmetric_kl(p, q), want, atol=1e-6)


def test_merge_is_greedy_in_order() -> None:
    maps = torch.tensor([[0.9, 0.05, 0.05], [0.88, 0.06, 0.06], [0.05, 0.05, 0.9]])
    merged = greedy_merge(maps, 0.1)
    assert len(merged) == 2 and torch.allclose(merged[0], maps[:2].mean(0))


def test_axis_of_the_minmax_is_the_one_named() -> None:
    """Over space a token's own scale does not matter; over tokens (the official code) it does."""
    plain, scaled = (worlds.capture(worlds.masks(), empty=True, layers=(0,), text=4, noise=0.1) for _ in range(2))
    scaled.passes[0].records[0].i2t[:, :, 1] *= 3.0

    def maps(capture, axis: str) -> torch.Tensor:
        return find("seg4diff-unsup").configure({"axis": axis, "tau": 0.0, "kinds": "pad"})(capture)

    assert torch.allclose(maps(plain, "space"), maps(scaled, "space"), atol=1e-6)
    assert not torch.allclose(maps(plain, "token"), maps(scaled, "token"), atol=1e-4)
    assert not torch.allclose(maps(plain, "none"), maps(scaled, "none"), atol=1e-4)


def test_cuts_separate_blocks_and_leave_one_block_whole() -> None:
    blocks = np.kron(np.eye(3), np.ones((20, 20))) * 0.9 + 0.001
    groups = normalised_cuts(blocks, 0.5)
    assert sorted(tuple(group) for group in groups) == [tuple(range(a, a + 20)) for a in (0, 20, 40)]
    assert len(normalised_cuts(np.ones((30, 30)), 0.5)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffseg", "diffcut"])
def test_clustering_at_64_by_64_takes_seconds(name: str) -> None:
    one = worlds.capture(worlds.masks(64, 64), layers=(0,), heads=1, noise=0.05, empty=True)
    start = time.process_time()
    proposals = find(name)(one)
    assert len(np.unique(label(proposals))) >= 3
    assert time.process_time() - start < 30


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="softmax"):
        find("seg4diff").configure({"sofmax": "joint"})
    with pytest.raises(UserError, match="did you mean 'diffseg"):
        find("difseg")


@pytest.mark.parametrize(
    ("method", "text", "value"),
    [
        ("diffseg", "tau=0.5", 0.5),
        ("diffseg", "tau=0.9,0.5", (0.9, 0.5)),
        ("diffseg", "tau=1", 1),
        ("iseg", "cluster=false", False),
        ("seg4diff-unsup", "kinds=pad,eos", "pad,eos"),
        ("diffsegmenter", "order=2", 2),
        ("diffseg", "rounds=none", None),
        ("seg4diff", "streams=clip,t5", "clip,t5"),
        ("seg4diff", "heads=2", 2),
        ("seg4diff", "heads=0,2", (0, 2)),
        ("seg4diff", "heads=0-3", "0-3"),
        ("corrclip", "weights=1", (1,)),
        ("proxyclip", "side=336,336,112", (336, 336, 112)),
        ("proxyclip", "clip=12", "12"),  # a folder of this name
        ("proxyclip", "source=true", "true"),
    ],
)
def test_an_option_is_read_by_its_own_type(method: str, text: str, value: object) -> None:
    name, written = split_option(text)
    assert METHODS[method].configure({name: written}).options == {name: value}


@pytest.mark.parametrize("name", ["seg4diff", "diffsegmenter", "iseg", "tokenrank", "conceptattention", "diffcut"])
def test_weights_say_how_much_each_layer_counts(name: str) -> None:
    """Weight 1 on a layer is that layer alone; equal weights are the plain mean; a bad layer can be weighted away."""
    good, bad = worlds.capture(worlds.masks(), noise=0.1), worlds.without_information(worlds.capture(worlds.masks()))
    good.passes[0].records[1] = bad.passes[0].records[1]
    method = METHODS[name]
    alone = method(replace(good, layers=(0,)))
    assert torch.allclose(method(replace(good, weights=(1.0, 0.0))), alone, atol=1e-5)
    assert torch.allclose(method(replace(good, weights=(0.5, 0.5))), method(good), atol=1e-6)
    other, plain = method(replace(good, weights=(0.2, 0.8))), method(good)
    assert other.shape != plain.shape or not torch.allclose(other, plain, atol=1e-3)


def test_kmeans_moves_the_merged_proposals() -> None:
    one = worlds.capture(worlds.masks(), empty=True, noise=0.3)
    method = METHODS["diffseg"].configure({"tau": 0.0, "anchors": 2})  # nothing merges: four single maps
    plain, moved = method(one), method.configure({"kmeans": True})(one)
    assert moved.shape == plain.shape == (4, 8, 8) and not torch.allclose(moved, plain, atol=1e-6)
    counts = histogram(worlds.truth(worlds.masks())[::8, ::8], moved.argmax(0).numpy(), 3)
    assert ((counts > 0).sum(0) <= 1).all()  # each cluster lies in one region


@pytest.mark.parametrize("name", ["diffseg", "diffsegmenter", "iseg"])
def test_the_second_attention_is_read_where_it_is_asked_for(name: str) -> None:
    one = worlds.capture(worlds.masks(), empty=name == "diffseg")
    method = METHODS[name].configure({"i2i": "attn2"})
    assert "i2i_attn2" in method.needs and "i2i" not in method.needs and "i2i" in METHODS[name].needs
    for record in one.passes[0].records.values():
        record.i2i_attn2, record.i2i = record.i2i, None
    assert torch.allclose(method(one), METHODS[name](worlds.capture(worlds.masks(), empty=name == "diffseg")))
    with pytest.raises(UserError, match="did you mean 'attn2'"):
        METHODS[name].configure({"i2i": "atn2"})(one)


@pytest.mark.parametrize(
    ("method", "text", "words"),
    [
        ("iseg", "rounds=-1", "whole number from 1 to 10000000"),
        ("iseg", "rounds=1e300", "whole number from 1"),
        ("iseg", "rounds=99999999999", "whole number from 1"),
        ("iseg", "ent=abc", "a number of 0 or more"),
        ("diffsegmenter", "order=2.5", "whole number"),
        ("conceptattention", "temperature=abc", "a number of 0 or more or none"),
        ("seg4diff", "minmax=5", "true or false"),
        ("seg4diff", "heads=none", "cannot read 'none' as a head; expected all, 3, 0-3 or 0,5"),
        ("proxyclip", "side=0", "whole number from 1 to 10000000 or several by comma or none"),
        ("diffseg", "tau=nan", "a number of 0 or more"),
    ],
)
def test_options_of_another_kind_are_refused(method: str, text: str, words: str) -> None:
    name, value = split_option(text)
    with pytest.raises(UserError, match=words):
        METHODS[method].configure({name: value})


def test_every_kind_of_token_that_is_named_is_one() -> None:
    """One of two that was misspelt was left out."""
    one = worlds.capture(worlds.masks(), empty=True)
    with pytest.raises(UserError, match="unknown span kind 'eoss': did you mean 'eos'"):
        METHODS["seg4diff-unsup"].configure({"kinds": "pad,eoss"})(one)


@pytest.mark.parametrize("option", ["softmax", "normalise"])
def test_a_written_none_is_the_word_where_an_option_knows_it(option: str) -> None:
    """`--set conceptattention.normalise=none` was refused: the text was read as nothing at all."""
    one = worlds.capture(worlds.masks(), noise=0.2)
    name, value = split_option(f"{option}=none")
    written = METHODS["conceptattention"].configure({name: value})
    assert written.options == {option: "none"}
    assert torch.equal(written(one), METHODS["conceptattention"].configure({option: "none"})(one))


def test_one_head_may_be_named_by_its_number() -> None:
    one = worlds.capture(worlds.masks(), heads=3, noise=0.2)
    by_number, by_list = (METHODS["seg4diff"].configure({"heads": heads})(one) for heads in (2, [2]))
    assert torch.equal(by_number, by_list)
    with pytest.raises(UserError, match="head 9 does not exist"):
        METHODS["seg4diff"].configure({"heads": 9})(one)
