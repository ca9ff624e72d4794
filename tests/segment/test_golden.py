"""Every method of the registry against answers that were derived by hand; the words say which step gives which number.

At least two cases each. Grids are not square and never have as many tokens as there are classes; of the cases of a
method at least one has a class (or a proposal) that wins no token and one has a tie for the first place, which a test
reads off the answers; where a method reads words, a class has two. Random tensors and options are in test_formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mmdit_probe.data import SegClass
from mmdit_probe.segment import METHODS, Capture
from mmdit_probe.segment.clip import ClipInput
from mmdit_probe.segment.refine import Refinement

SPANS = {"wet grass": [1, 2], "cat": [3], "sky": [4]}
READ_WORDS = ("seg4diff", "diffsegmenter", "diffsegmenter-per-class", "iseg", "tokenrank")
E4 = np.array([[4, 2, 1, 1, 1, 1], [1, 2, 4, 1, 1, 1], [2, 2, 2, 1, 2, 1], [3, 2, 2, 1, 1, 1]]) / 10
"""Four distributions over 2 x 3 tokens. Tokens 1, 3 and 5 are ties of all; the last distribution wins no token.

Half the sum of (p - q) ln(p / q): first to last .049, third to last .055, every other pair .13 or more.
"""


class Golden(NamedTuple):
    """A case: scores [C, I] that a method must give of a capture."""

    capture: Capture
    want: Sequence[Sequence[float]]
    options: Mapping[str, Any] = MappingProxyType({})
    within: float = 1e-5


def world(**how: Any) -> Capture:
    """2 x 3 tokens; text: BOS, wet, grass, cat, sky. Tokens 0 and 1, and 3 and 4, attend to each other; 2 and 5 alone.

    Over two layers and two heads the map of "wet grass" is .2 .1 .05 .05 .15 .05, of "cat" .1 .1 .2 .2 .1 .1, of "sky"
    .04 everywhere; rows of I2I have other sums, as the text's mass is missing.
    """
    columns = np.array([[0.3] * 6, [0.3, 0.05, 0.05, 0.05, 0.1, 0.05], [0.1, 0.15, 0.05, 0.05, 0.2, 0.05],
                        [0.1, 0.1, 0.2, 0.2, 0.1, 0.1], [0.04] * 6]).T  # fmt: skip
    away = np.random.default_rng(0).uniform(0, 0.01, (2, *columns.shape))  # layers and heads differ, not their mean
    i2t = {2: np.stack([columns + away[0], columns - away[0]]), 5: np.stack([columns - away[1], columns + away[1]])}
    walk = np.zeros((6, 6))
    for pair in ([0, 1], [3, 4], [2], [5]):
        walk[np.ix_(pair, pair)] = 1 / len(pair)
    walk = np.array([0.5, 0.4, 0.6, 0.3, 0.5, 0.55])[:, None] * walk
    return Capture.of((2, 3), i2t=i2t, i2i={2: walk, 5: 0.8 * walk}, **{"spans": SPANS, **how})


SPREAD = [[1, 1, 0, 0.5, 0.5, 0], [0, 0, 1, 0.5, 0.5, 0], [0] * 6]
"""The world's maps after the walk, scaled: pairs take their mean, .15 .15 .05 .1 .1 .05 and .1 .1 .2 .15 .15 .1; a map
that is the same everywhere is nowhere."""


def line(i2i: Any, *maps: Sequence[float]) -> Capture:
    """3 x 1 tokens and one word per map, behind a BOS."""
    i2t = np.array([[0.5] * 3, *maps]).T
    return Capture.of((3, 1), i2t=i2t, i2i=i2i, spans={f"class {k}": [k + 1] for k in range(len(maps))})


def prompts(*captures: Capture) -> Capture:
    """Captures of one name each as the prompts of one, of these classes."""
    passes = []
    for index, one in enumerate(captures):
        query = replace(one.passes[0].prompt.queries[0], of_class=index)
        passes.append(replace(one.passes[0], prompt=replace(one.passes[0].prompt, queries=(query,))))
    return replace(captures[0], classes=[SegClass((str(k),)) for k in range(len(captures))], passes=passes)


# Class maps


def seg4diff_joint() -> Golden:
    """Means over layers, heads and words; the second token is a tie of .1, sky wins nowhere."""
    return Golden(world(), [[0.2, 0.1, 0.05, 0.05, 0.15, 0.05], [0.1, 0.1, 0.2, 0.2, 0.1, 0.1], [0.04] * 6])


def seg4diff_prompts() -> Golden:
    """Of two prompts odds are read: .1 of text mass .5 is .2, .3 of .25 is .4; the first prompt alone reads .1."""
    first = Capture.of((3, 1), i2t=[[0.4, 0.1], [0.4, 0.1], [0.0, 0.3]], spans={"a": [1]})
    second = Capture.of((3, 1), i2t=[[0.4, 0.1], [0.3, 0.2], [0.5, 0.3]], spans={"b": [1]})
    return Golden(prompts(first, second), [[0.2, 0.2, 3 / 7], [0.2, 0.4, 1.5]])


def spread() -> Golden:
    return Golden(world(), SPREAD)


def turned() -> Golden:
    """Token 0 looks at 1, 1 at 2, 2 at 0: after two steps each has the value of the one before it."""
    return Golden(line(np.roll(np.eye(3), 1, 1), [0.3, 0.2, 0.1], [0.1, 0.2, 0.2]), [[0, 1, 0.5], [1, 0, 1]],
                  {"order": 2})  # fmt: skip


def each_prompt_has_its_walk() -> Golden:
    """The first prompt's tokens stay where they are, the second's move on by one."""
    still, moved = line(np.eye(3), [0.3, 0.2, 0.1]), line(np.roll(np.eye(3), 1, 1), [0.3, 0.2, 0.1])
    return Golden(prompts(still, moved), [[1, 0.5, 0], [0.5, 0, 1]], {"softmax": "joint"})


def iseg_spread() -> Golden:
    """Both words of "wet grass" have the same sum, so the mean of their shares is that of their maps."""
    return Golden(world(), SPREAD, {"cluster": False, "rounds": 3}, 1e-4)


def iseg_cuts_weak_links() -> Golden:
    """Links of .25 of their column's largest become .25 + 2 log10(.25 e) < 0 and are cut: the map stays."""
    i2i = [[0.4, 0.1, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.9]]
    return Golden(line(i2i, [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]), [[1, 0.5, 0], [0, 0.5, 1]],
                  {"ent": 2.0, "rounds": 1, "cluster": False})  # fmt: skip


def iseg_keeps_weak_links() -> Golden:
    """Without the entropy term the rows are .8 .2 and .2 .8: .2 .1 0 becomes .18 .12 0, and 0 .1 .2 becomes .02 .08
    .2."""
    i2i = [[0.4, 0.1, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.9]]
    return Golden(line(i2i, [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]), [[1, 2 / 3, 0], [0, 1 / 3, 1]],
                  {"ent": 0.0, "rounds": 1, "cluster": False})  # fmt: skip


def iseg_divides_by_columns() -> Golden:
    """Links .5 and 1 by their columns' largest, .5 and 1, are 1 and .5; plus .5 log10(e a), shares .682 and .318 of .2
    and .1, which is .168. Two words of sums .5 and 1 share .35 .3 .35, whose .05 0 .05 become .034 0 .05."""
    first, second = 1 + 0.5 * np.log10(np.e), 0.5 + 0.5 * np.log10(np.e / 2)
    mine = first / (first + second)
    i2t = np.array([[0.2] * 3, [0.3, 0.2, 0.1], [0.3, 0.1, 0.1], [0.1, 0.4, 0.5]]).T
    one = Capture.of((3, 1), i2t=i2t, i2i=[[0.3, 0.3, 0], [0, 0.7, 0], [0, 0, 0.4]], spans={"a": [1], "b": [2, 3]})
    return Golden(one, [[1, 0.1 / (0.1 + 0.1 * mine), 0], [mine, 0, 1]], {"ent": 0.5, "rounds": 1, "cluster": False})


def iseg_clusters() -> Golden:
    """12 x 13 pixels of two kinds; seeds are every second one. The others have noise and go to their kind's seed, the
    seeds to the first of theirs: two clusters, each of one value."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, (12, 13))
    noise = rng.uniform(0.9, 1.1, (12, 13, 3))
    noise[::2, ::2] = 1.0
    i2t = (np.array([[0.4, 0.3, 0.1], [0.4, 0.1, 0.3]])[kind] * noise).reshape(-1, 3)
    one = Capture.of((12, 13), i2t=i2t, i2i=np.eye(len(i2t)), spans={"a": [1], "b": [2]})
    return Golden(one, [(kind.ravel() == 0).tolist(), (kind.ravel() == 1).tolist()], {"rounds": 1}, 1e-3)


def tokenrank_spread() -> Golden:
    """The pairs' walk has columns that sum to 1 as well, so uniform steps add one number everywhere."""
    return Golden(world(), SPREAD, {}, 1e-4)


def tokenrank_columns() -> Golden:
    """Columns .5 1 .5, .5 0 0 and 0 0 .5 divided by their sums: .4 .1 .2 becomes .2 .2 .3, then .25 .1 .35;
    .2 everywhere .25 .1 .25, then .1625 .125 .3125."""
    i2i = [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    return Golden(line(i2i, [0.4, 0.1, 0.2], [0.2, 0.2, 0.2]), [[0.6, 0, 1], [0.2, 0, 1]],
                  {"bounces": 3, "teleport": 0.0}, 1e-4)  # fmt: skip


def tokenrank_flat() -> Golden:
    """Rows and columns of a circulant sum to 1: a map of one token becomes the weights, a flat one stays flat, and the
    rounding of its sums (1e-8 here) is not stretched to 0..1."""
    weights = np.random.default_rng(0).integers(1, 40, 11) / 1.0
    i2t = np.array([[0.1] * 11, [0.7] + [0.0] * 10, [0.04] * 11]).T
    circulant = np.stack([np.roll(weights, k) for k in range(11)]) / weights.sum()
    one = Capture.of((11, 1), i2t=i2t, i2i=circulant, spans={"a": [1], "b": [2]})
    column = np.roll(weights[::-1], 1)
    least, most = column.min(), column.max()
    return Golden(one, [((column - least) / (most - least)).tolist(), [0] * 11])


# Concepts


def concepts(family: str, vectors: Any, features: Any) -> Capture:
    spans: dict[str, list[int]] = {name: [] for name in ("a", "b", "c")}
    return Capture.of((1, 4), features=features, concepts=vectors, spans=spans, family=family)


def concepts_sd3() -> Golden:
    """Unit concepts, (1, 0), (0, 1) and (1, -1) by the root of 2; softmax of their products with four tokens."""
    e, half = np.e, 2**-0.5
    one = concepts("sd3", [[4.0, 0], [0, 1], [3, -3]], [[1.0, 0], [0, 1], [1, 1], [1, -1]])
    powers = np.array([[e, 1, e, e], [1, e, e, 1 / e], [e**half, e**-half, 1, e ** (2 * half)]])
    return Golden(one, (powers / powers.sum(0)).tolist())


def concepts_flux() -> Golden:
    """Products ln 4, ln 2, 0 as they are; softmax in each of two layers, then the mean."""
    two, four = np.log(2), np.log(4)
    one = concepts(
        "flux", {0: [[four, 0], [0, two], [0, 0]], 1: [[0, 0], [0, 0], [0, 0]]},
        {layer: [[1.0, 0], [0, 1], [0, 0], [1, 2]] for layer in (0, 1)},
    )  # fmt: skip
    want = np.array([[4 / 6, 1 / 4, 1 / 3, 4 / 9], [1 / 6, 2 / 4, 1 / 3, 4 / 9], [1 / 6, 1 / 4, 1 / 3, 1 / 9]])
    return Golden(one, ((want + 1 / 3) / 2).tolist())


def concepts_flux2() -> Golden:
    """Products of two layers are averaged first, over 1000: ln 4 and 0 to ln 2."""
    four = 1000 * np.log(4)
    one = concepts(
        "flux2", {0: [[four, 0], [0, four], [0, 0]], 1: [[0, 0], [0, 0], [0, 0]]},
        {layer: [[1.0, 0], [0, 1], [1, 1], [2, 0]] for layer in (0, 1)},
    )  # fmt: skip
    return Golden(one, [[2 / 4, 1 / 4, 2 / 5, 4 / 6], [1 / 4, 2 / 4, 2 / 5, 1 / 6], [1 / 4, 1 / 4, 1 / 5, 1 / 6]])


# CLIP


ROOT = 2**0.5
GATHERED = np.array([[2, 2, 1, 1], [2, 2, 2**ROOT, 2**ROOT], [0.5, 0.5, 1, 1]])
"""Tokens 0 and 1 take the mean (.5, .5) of (1, 0) and (0, 1), tokens 2 and 3 that of (0, 2) and (0, 4): unit vectors at
45 and 90 degrees. Their products with the texts are .707, .707, -.707 and 0, 1, 0; times ln 2 and the root of 2, and in
the exponent, 2, 2, 1/2 and 1, 2^1.41, 1, as shares."""
TWO = [[1.0, 0], [2, 0], [0, 1], [0, 3]]
"""Features of two kinds: cosines 1 within the first and the last two tokens, 0 between them, mean .5."""


def by_clip(features: Any, want: Any = GATHERED, regions: Any = None, **options: Any) -> Golden:
    text = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    vectors = torch.tensor([[[1.0, 0], [0, 1], [0, 2], [0, 4]]])
    spans: dict[str, list[int]] = {"cat": [], "wet grass": [], "sky": []}
    one = Capture.of((1, 4), features=features, regions=regions, spans=spans)
    given = {"clip": ClipInput(text=text, features=vectors), "temperature": float(np.log(2) * ROOT)}
    return Golden(one, (want / want.sum(0)).tolist(), given | options)


def proxyclip_features() -> Golden:
    """3 (1 - 1.2 .5) = 1.2 within a kind, the diagonal too; 3 (0 - 1.2 .5) < 0 between them, which is cut."""
    return by_clip(TWO)


def proxyclip_attention() -> Golden:
    """Rows of I2I brought to a sum of 1."""
    walk = np.kron(np.eye(2), np.ones((2, 2))) * np.array([[0.2], [0.1], [0.3], [0.45]])
    golden = by_clip(TWO, source="i2i")
    return golden._replace(capture=Capture.of((1, 4), i2i=walk, spans={"cat": [], "wet grass": [], "sky": []}))


def proxyclip_weighs_the_diagonal() -> Golden:
    """Without centring, 2 ln 2 times the cosine: weights 4 on the diagonal, 2^1.41 at 45 degrees, 1 at 90."""
    near = 2**ROOT
    weights = np.array([[4, near, 1, 1], [near, 4, near, near], [1, near, 4, 4], [1, near, 4, 4]])
    mixed = weights / weights.sum(1, keepdims=True) @ np.array([[1.0, 0], [0, 1], [0, 2], [0, 4]])
    unit = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    want = 2 ** (ROOT * np.array([[1.0, 0], [0, 1], [-1, 0]]) @ unit.T)
    return by_clip([[1.0, 0], [1, 1], [0, 1], [0, 3]], want, beta=0.0, gamma=float(2 * np.log(2)))


def corrclip_regions() -> Golden:
    """Tokens of one region mix evenly, whose cosines are 1; those of another do not."""
    return by_clip(TWO, regions=[[1, 1, 2, 2]], weights=(0, 0))


def corrclip_merges() -> Golden:
    """Regions 1 and 2 have one mean feature: they are one region."""
    return by_clip(TWO, regions=[[1, 2, 3, 3]], weights=(0, 0))


def corrclip_no_region() -> Golden:
    """Token 1 has no region: it mixes with token 0, whose cosine 1 is above the mean .5, and with no other."""
    return by_clip(TWO, regions=[[1, 0, 2, 2]], weights=(0, 0))


def corrclip_splits() -> Golden:
    """A cosine of .79 lies .21 below the largest, which is more than .2: three regions, the last of two tokens."""
    want = 2 ** (ROOT * np.array([[1, 0, 0, 0], [0, 1, 1, 1], [-1, 0, 0, 0]]))
    return by_clip([[1.0, 0], [0.79, 0.6131], [-1, 0], [-2, 0]], want, regions=[[1, 2, 3, 3]], weights=(0, 0))


def corrclip_two_without_a_region() -> Golden:
    """Tokens 0 and 1 have no region, which is not one region: their cosine 0 is below the mean, 2 / 16."""
    want = 2 ** (ROOT * np.array([[1, 0, 0, 0], [0, 1, 1, 1], [-1, 0, 0, 0]]))
    return by_clip([[1.0, 0], [0, 1], [-1, 0], [-2, 0]], want, regions=[[0, 0, 1, 1]], weights=(0, 0))


def corrclip_weighs_cosines() -> Golden:
    """Within a region ln 2 times the cosines 1 and 0: 2/3 of oneself, 1/3 of the other."""
    unit = np.array([[2, 1], [1, 2]]) / 5**0.5
    want = 2 ** (ROOT * np.array([[1.0, 0], [0, 1], [-1, 0]]) @ np.array([*unit, [0, 1], [0, 1]]).T)
    return by_clip([[1.0, 0], [0, 1], [-1, 0], [-1, 0]], want, regions=[[1, 1, 2, 2]], weights=(0, 0),
                   tau=float(np.log(2)))  # fmt: skip


# Segments


def pads(**options: Any) -> Golden:
    """Columns whose softmax over space is `E4`."""
    return Golden(Capture.of((2, 3), i2t=0.1 * np.log(10 * E4).T), [], {"axis": "none", **options})


def pads_apart() -> Golden:
    """Logarithms of the distributions are their columns; a tenth of them flattens each to p^.1."""
    powers = E4**0.1
    return pads(tau=0.0)._replace(want=(powers / powers.sum(1, keepdims=True)).tolist())


def pads_merged() -> Golden:
    """First and last are near; so are third and last, which was taken and may be again. Two of the others are not."""
    one = Capture.of((2, 3), i2t=np.log(10 * E4).T)
    first, second, third, last = E4
    return Golden(one, [((first + last) / 2).tolist(), second.tolist(), ((third + last) / 2).tolist()],
                  {"axis": "none", "tau": 0.1})  # fmt: skip


def pads_over_tokens() -> Golden:
    """At each of 2 x 2 pixels the least token is 0, the largest 1; softmax over space of 1 0 1 0: e / (2 e + 2), ..."""
    e = np.e
    one = Capture.of((1, 4), i2t=[[0.2, 0.1, 0.1], [0.2, 0.3, 0.2], [0.4, 0.2, 0.2], [0.1, 0.2, 0.1]],
                     kinds=["bos", "pad", "eos"])  # fmt: skip
    high, low = e / (2 * e + 2), 1 / (2 * e + 2)
    return Golden(one, [[high, low, high, low], [low, high, low, high], [0.25] * 4],
                  {"axis": "token", "tau": 0.0, "kinds": "all"})  # fmt: skip


def attention(tau: Any) -> Golden:
    """Tokens 0 and 1 have the first of `E4`, 2 and 3 the second, 4 the third, 5 the last; the text has a third."""
    rows = E4[[0, 0, 1, 1, 2, 3]]
    return Golden(Capture.of((2, 3), i2i=rows * np.linspace(0.5, 0.8, 6)[:, None]), [], {"tau": tau})


def diffseg_equal() -> Golden:
    """Equal rows are one proposal, others are not; the last wins no token."""
    return attention((0.01, 0.01))._replace(want=[list(p) for p in E4])


def diffseg_rounds() -> Golden:
    """The first round finds equal rows; the second merges .049 and .055 below .1: the first two rows and the last."""
    first, second, third, last = E4
    return attention((0.01, 0.1))._replace(
        want=[((2 * first + last) / 3).tolist(), second.tolist(), ((third + last) / 2).tolist()]
    )


def diffcut_empty() -> Golden:
    """1 x 6 tokens pooled to three nodes at 0, 90 and 45 degrees, cosines 0 and .707^10 = .03: three clusters. The
    tokens of the third are those of the others, so that it wins none."""
    features = np.array([[1.0, 0], [2, 0], [0, 1], [0, 3], [1, 0], [0, 1]])
    half = 2**-0.5
    return Golden(Capture.of((1, 6), features=features),
                  [[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1], [half] * 6], {"pool": 3, "alpha": 10})  # fmt: skip


def diffcut_tie() -> Golden:
    """The fifth token lies between the first two clusters and as near to the third, whose other token is upright."""
    half = 2**-0.5
    features = np.array([[1.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 3, 0], [1, 1, 0], [0, 0, 4]])
    return Golden(Capture.of((1, 6), features=features),
                  [[1, 1, 0, 0, half, 0], [0, 0, 1, 1, half, 0], [0.5, 0.5, 0.5, 0.5, half, half]],
                  {"pool": 3, "alpha": 10})  # fmt: skip


def diffcut_short_centres() -> Golden:
    """Tokens at 0 (three), 80 and 110 degrees: of the affinities 1, .59, .008 and 0 the .59 is not cut (.74 > .5). The
    centre of the last two is their mean, .97 long."""
    angles = np.deg2rad([0, 0, 0, 80, 110])
    unit = np.stack([np.cos(angles), np.sin(angles)], 1)
    centre = np.cos(np.deg2rad(15)) * np.array([np.cos(np.deg2rad(95)), np.sin(np.deg2rad(95))])
    return Golden(Capture.of((1, 5), features=unit * np.array([1, 2, 3, 4, 5])[:, None]),
                  [np.cos(angles).tolist(), (unit @ centre).tolist()], {"alpha": 5, "tau": 0.5})  # fmt: skip


GOLDEN: dict[str, list[Callable[[], Golden]]] = {
    "seg4diff": [seg4diff_joint, seg4diff_prompts],
    "diffsegmenter": [spread, turned],
    "diffsegmenter-per-class": [spread, turned, each_prompt_has_its_walk],
    "iseg": [iseg_spread, iseg_cuts_weak_links, iseg_keeps_weak_links, iseg_divides_by_columns, iseg_clusters],
    "tokenrank": [tokenrank_spread, tokenrank_columns, tokenrank_flat],
    "conceptattention": [concepts_sd3, concepts_flux, concepts_flux2],
    "proxyclip": [proxyclip_features, proxyclip_attention, proxyclip_weighs_the_diagonal],
    "corrclip": [
        corrclip_regions,
        corrclip_merges,
        corrclip_no_region,
        corrclip_splits,
        corrclip_weighs_cosines,
        corrclip_two_without_a_region,
    ],
    "seg4diff-unsup": [pads_apart, pads_merged, pads_over_tokens],
    "diffseg": [diffseg_equal, diffseg_rounds],
    "diffcut": [diffcut_empty, diffcut_tie, diffcut_short_centres],
}  # fmt: skip
"""Method -> its cases; `test_every_method_has_its_cases` compares them with the registry."""


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in GOLDEN.items() for case in cases])
def test_golden(name: str, case: Callable[[], Golden]) -> None:
    capture, want, options, within = case()
    found = METHODS[name].configure(options)(capture).flatten(1).double().numpy()
    assert found.shape == np.shape(want)
    assert np.abs(found - np.array(want)).max() <= within


def tied(want: np.ndarray) -> bool:
    """Two of the scores above 0 share the first place of a token."""
    ranked = np.sort(want, axis=0)
    return bool(((ranked[-1] - ranked[-2] < 1e-9) & (ranked[-1] > 0)).any())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_cases(name: str) -> None:
    cases = [case() for case in GOLDEN[name]]
    wants = [np.array(case.want, float) for case in cases]
    assert len(cases) >= 2
    for case, want in zip(cases, wants, strict=True):
        height, width = case.capture.grid
        assert height != width and len(want) != height * width
    assert any(len(set(want.argmax(0))) < len(want) for want in wants), "no class wins nothing"
    assert any(map(tied, wants)), "no tie"
    if name in READ_WORDS:
        queries = [query for case in cases for _, query in case.capture.queries]
        assert any(len(query.positions()) > 1 for query in queries), "no class has several words"


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 5), (21, 20)])
@pytest.mark.parametrize("mass", [0.6, 0.0])
def test_a_picture_whose_tokens_are_all_alike_is_one_segment(grid: tuple[int, int], mass: float) -> None:
    """DiffCut cut it into its tokens (above 400 ARPACK ended it), and what walks along uniform attention was lost."""
    count = grid[0] * grid[1]
    capture = Capture.of(
        grid, i2t=torch.full((2, count, 3), 0.1), i2i=torch.full((2, count, count), mass / count), spans={"cat": [1]},
        features=torch.linspace(0.1, 1.3, 8).expand(count, 8) * (mass > 0),
    )  # fmt: skip
    assert len(METHODS["diffcut"](capture)) == len(METHODS["diffseg"](capture)) == 1
    walked = Refinement.parse("walk").on_grid(METHODS["seg4diff"](capture), capture)
    assert torch.allclose(walked, torch.full((1, *grid), 0.1 if mass else 0.0), rtol=1e-4)
