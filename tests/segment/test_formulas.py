"""Methods and their options on random tensors, against a few lines of float64 numpy from the papers' formulas.

Answers by hand, with ties and classes that win nothing, are in test_golden; the CLIP-based methods' formulas, whose
tower is a real one, in test_clip. And what is refused of one's own tensors.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.errors import RunError, UserError
from mmdit_probe.segment import METHODS, Capture
from mmdit_probe.segment.clip import ClipInput
from mmdit_probe.segment.record import JointRecord

SPANS = {"wet grass": [1, 2], "cat": [4], "blue old house": [5, 6, 7]}
LAYERS = (2, 5)


def joint(seed: int, h: int, w: int, text: int = 9, heads: int = 3) -> dict[int, dict[str, np.ndarray]]:
    """Random joint attention of two layers: logits [H, I, I + T] and its softmax, cut into blocks; features [I, 7]."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in LAYERS:
        logits = rng.normal(0, 1.5, (heads, h * w, h * w + text))
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        found[layer] = {
            "logits": logits[..., h * w :], "i2t": shares[..., h * w :], "i2i": shares[..., : h * w],
            "features": rng.normal(0, 1, (h * w, 7)), "concepts": rng.normal(0, 1, (len(SPANS), 7)),
        }  # fmt: skip
    return found


def capture_of(parts: dict[int, dict[str, np.ndarray]], grid: tuple[int, int], **how) -> Capture:
    return Capture.of(
        grid,
        i2t={layer: one["i2t"] for layer, one in parts.items()},
        i2t_logit={layer: one["logits"] for layer, one in parts.items()},
        i2i={layer: one["i2i"] for layer, one in parts.items()},
        features={layer: one["features"] for layer, one in parts.items()},
        concepts={layer: one["concepts"] for layer, one in parts.items()},
        **{"spans": SPANS, **how},
    )


def scores(name: str, capture: Capture, **options) -> np.ndarray:
    return METHODS[name].configure(options)(capture).numpy().reshape(-1, capture.grid[0] * capture.grid[1])


def close(found: np.ndarray, want: np.ndarray, within: float = 1e-5) -> None:
    assert found.shape == want.shape and np.abs(found - want).max() <= within


def over_layers(parts: dict[int, dict[str, np.ndarray]], read) -> np.ndarray:
    return np.mean([read(one) for one in parts.values()], axis=0)


def words(maps: np.ndarray) -> np.ndarray:
    """[I, T] -> [C, I]."""
    return np.stack([maps[:, span].mean(1) for span in SPANS.values()])


def unit_range(rows: np.ndarray) -> np.ndarray:
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    return (rows - low) / (high - low)


@pytest.fixture(params=[(0, 2, 5), (1, 4, 3)], ids=["2x5", "4x3"])
def world(request) -> tuple[dict[int, dict[str, np.ndarray]], Capture]:
    seed, h, w = request.param
    parts = joint(seed, h, w)
    return parts, capture_of(parts, (h, w))


# seg4diff


def test_seg4diff_by_hand() -> None:
    """1 x 3 tokens, text: bos, wet, grass, cat. The mean of "wet grass" is .2, .15, .1; ties go to the first class."""
    i2t = [[0.3, 0.1, 0.3, 0.1], [0.3, 0.2, 0.1, 0.15], [0.3, 0.1, 0.1, 0.2]]
    found = METHODS["seg4diff"](Capture.of((1, 3), i2t=i2t, spans={"wet grass": [1, 2], "cat": [3]}))
    assert found.flatten(1).tolist() == [pytest.approx([0.2, 0.15, 0.1]), pytest.approx([0.1, 0.15, 0.2])]
    assert found.argmax(0).tolist() == [[0, 0, 1]]
    added = METHODS["seg4diff"].configure({"reduce": "sum"})
    assert added(Capture.of((1, 3), i2t=i2t, spans={"wet grass": [1, 2], "cat": [3]})).argmax(0).tolist() == [[0, 0, 0]]


def test_seg4diff_readings(world) -> None:
    parts, one = world
    close(scores("seg4diff", one), words(over_layers(parts, lambda p: p["i2t"].mean(0))))
    close(scores("seg4diff", one, heads=[0, 2]), words(over_layers(parts, lambda p: p["i2t"][[0, 2]].mean(0))))
    close(scores("seg4diff", one, heads={2: [1]}), words((parts[2]["i2t"][1] + parts[5]["i2t"].mean(0)) / 2))
    close(scores("seg4diff", one, softmax="logit"), words(over_layers(parts, lambda p: p["logits"].mean(0))))
    raw = words(over_layers(parts, lambda p: p["logits"].mean(0)))
    close(scores("seg4diff", one, softmax="logit", minmax=True), unit_range(raw))
    odds = over_layers(parts, lambda p: (p["i2t"] / p["i2i"].sum(-1, keepdims=True)).mean(0))
    close(scores("seg4diff", one, softmax="image-odds"), words(odds), 1e-4)
    text = over_layers(parts, lambda p: (p["i2t"] / p["i2t"].sum(-1, keepdims=True)).mean(0))
    close(scores("seg4diff", one, softmax="text"), words(text))


# diffsegmenter, tokenrank, iseg


@pytest.mark.parametrize("name", ["diffsegmenter", "diffsegmenter-per-class"])
@pytest.mark.parametrize("order", [1, 3])
def test_diffsegmenter(world, name: str, order: int) -> None:
    parts, one = world
    walk = over_layers(parts, lambda p: p["i2i"].mean(0))
    walk = walk / walk.sum(1, keepdims=True)
    start = unit_range(words(over_layers(parts, lambda p: p["i2t"].mean(0))))
    want = unit_range((np.linalg.matrix_power(walk, order) @ start.T).T)
    close(scores(name, one, order=order), want, 1e-4)


@pytest.mark.parametrize("bounces", [1, 2, 4])
def test_tokenrank(world, bounces: int) -> None:
    parts, one = world

    start = words(over_layers(parts, lambda p: p["i2t"].mean(0)))

    def want(rows: np.ndarray) -> np.ndarray:
        chain = 0.99 * rows / rows.sum(1, keepdims=True) + 0.01 / len(rows)
        return unit_range((np.linalg.matrix_power(chain / chain.sum(0), bounces - 1) @ start.T).T)

    single = {layer: p | {"i2i": p["i2i"][0]} for layer, p in parts.items()}
    rows = over_layers(single, lambda p: p["i2i"] / p["i2i"].sum(-1, keepdims=True))
    close(scores("tokenrank", capture_of(single, one.grid), bounces=bounces), want(rows), 1e-4)

    def weighted(p: dict[str, np.ndarray]) -> np.ndarray:
        heads = p["i2i"] / p["i2i"].sum(-1, keepdims=True)
        weights = [np.sort(np.abs(np.linalg.eigvals(head)))[-2] for head in heads]
        return np.average(heads, axis=0, weights=weights)

    close(scores("tokenrank", one, bounces=bounces), want(over_layers(parts, weighted)), 1e-4)


def test_diffsegmenter_by_hand() -> None:
    """Tokens 0 and 1 look at each other, token 2 at itself: the map 1, 0, 0 spreads to .5, .5, 0 and is scaled."""
    i2i = 0.6 * np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    one = Capture.of((1, 3), i2t=[[0.1, 0.3], [0.1, 0.1], [0.1, 0.1]], i2i=i2i, spans={"cat": [1]})
    assert scores("diffsegmenter", one).tolist() == [pytest.approx([1.0, 1.0, 0.0])]
    assert scores("tokenrank", one, bounces=2, teleport=0.0).tolist() == [pytest.approx([1.0, 1.0, 0.0])]
    with pytest.raises(UserError, match=r"teleport=1\.5: expected a share from 0 to 1"):
        scores("tokenrank", one, teleport=1.5)


def iseg_of(maps: np.ndarray, block: np.ndarray, grid: tuple[int, int], ent: float, rounds: int, cluster: bool):
    """iSeg written out pixel by pixel: maps [I, T], block [I, I]."""
    h, w = grid
    profile = maps / maps.sum(0)
    if cluster:
        value = np.where(profile < 1e-6, 1e-6, profile)
        logs = np.log(value + 1e-5)
        step = max(1, int(min(h, w) // 32**0.5))
        centres = [value[y * w + x] for y in range(0, h, step) for x in range(0, w, step)]
        for _ in range(20):
            far = [[0.5 * ((v + 1e-5 - c - 1e-5) * (log - np.log(c + 1e-5))).sum() for c in centres]
                   for v, log in zip(value, logs, strict=True)]  # fmt: skip
            members = np.argmin(far, axis=1)
            centres = [value[members == k].mean(0) for k in np.unique(members)]
            members = np.unique(members, return_inverse=True)[1]
        profile = np.stack([centres[k] for k in members])
    affinity = block / block.sum(1, keepdims=True)
    affinity = affinity / affinity.max(0)
    affinity = np.maximum(affinity + ent * np.log10(np.e * affinity), 0)
    affinity = affinity / affinity.sum(1, keepdims=True)
    out = []
    for span in SPANS.values():
        c = profile[:, span].mean(1)
        for _ in range(rounds + 1):
            c = (c - c.min()) / (c - c.min()).sum()
            if _ < rounds:
                c = affinity @ c
        out.append(unit_range(c))
    return np.stack(out)


@pytest.mark.parametrize(("ent", "rounds"), [(0.015, 8), (0.2, 2)])
def test_iseg(world, ent: float, rounds: int) -> None:
    parts, one = world
    maps = over_layers(parts, lambda p: p["i2t"].mean(0))
    block = over_layers(parts, lambda p: p["i2i"].mean(0))
    want = iseg_of(maps, block, one.grid, ent, rounds, cluster=False)
    close(scores("iseg", one, ent=ent, rounds=rounds, cluster=False), want, 2e-3)


def test_iseg_clusters_pixels_of_like_profiles() -> None:
    grid = (12, 14)
    parts = joint(3, *grid, heads=1)
    kinds = np.random.default_rng(0).integers(0, 4, 12 * 14)
    for one in parts.values():  # four kinds of pixels and little else, so that no assignment hangs on rounding
        one["i2t"] = one["i2t"][:, :4][:, kinds] * np.random.default_rng(1).uniform(0.98, 1.02, one["i2t"].shape)
    maps = over_layers(parts, lambda p: p["i2t"].mean(0))
    block = over_layers(parts, lambda p: p["i2i"].mean(0))
    found = scores("iseg", capture_of(parts, grid), rounds=1)
    close(found, iseg_of(maps, block, grid, 0.015, 1, cluster=True), 2e-3)
    assert np.abs(found - iseg_of(maps, block, grid, 0.015, 1, cluster=False)).max() > 0.01


# conceptattention


@pytest.mark.parametrize("family", ["sd3", "flux", "flux2", ""])
def test_conceptattention_has_the_rule_of_the_family(world, family: str) -> None:
    """SD3: unit concepts, softmax by layer; Flux: softmax by layer; Flux.2: softmax of the mean over 1000."""
    parts, _ = world
    one = capture_of(parts, world[1].grid, family=family)

    def products(p: dict[str, np.ndarray]) -> np.ndarray:
        length = np.linalg.norm(p["concepts"], axis=1, keepdims=True) if family == "sd3" else 1.0
        return p["concepts"] / length @ p["features"].T

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(0)

    want = over_layers(parts, lambda p: softmax(products(p)))
    if family == "flux2":
        want = softmax(over_layers(parts, products) / 1000)
    close(scores("conceptattention", one), want)


@pytest.mark.parametrize("normalise", ["none", "concepts", "both"])
def test_conceptattention_takes_other_rules_than_the_familys(world, normalise: str) -> None:
    parts, one = world

    def unit(x: np.ndarray, wanted: bool) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True) if wanted else x

    want = over_layers(
        parts, lambda p: 3 * unit(p["concepts"], normalise != "none") @ unit(p["features"], normalise == "both").T
    )
    close(scores("conceptattention", one, normalise=normalise, softmax="none", temperature=3.0), want)


def test_conceptattention_by_hand() -> None:
    """A long concept wins everywhere under Flux's rule, not under SD3's; equal products are a tie at one half."""
    concepts, image = [[4.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    given = {"features": np.array(image), "concepts": np.array(concepts), "spans": {"a": [], "b": []}}
    sd3 = scores("conceptattention", Capture.of((3, 1), family="sd3", **given))
    flux = scores("conceptattention", Capture.of((3, 1), family="flux", **given))
    e = np.e
    close(sd3, np.array([[e / (1 + e), 1 / (1 + e), 0.5], [1 / (1 + e), e / (1 + e), 0.5]]))
    close(flux[0], np.array([e**4 / (e**4 + 1), 1 / (1 + e), e**4 / (e**4 + e)]))


# unsupervised


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(0.5 * ((p - q) * (np.log(p) - np.log(q))).sum())


def merged(maps: list[np.ndarray], tau: float) -> list[np.ndarray]:
    taken, proposals = set(), []
    for i, one in enumerate(maps):
        if i not in taken:
            group = [j for j, other in enumerate(maps) if j == i or distance(one, other) < tau]
            taken |= set(group)
            proposals.append(np.mean([maps[j] for j in group], axis=0))
    return proposals


@pytest.mark.parametrize("tau", [0.0, 0.002, 0.02, 1e9])
@pytest.mark.parametrize("axis", ["token", "space"])
def test_seg4diff_unsup(world, tau: float, axis: str) -> None:
    """With axis "token" and every kind of token it is the official function."""
    parts, one = world
    maps = over_layers(parts, lambda p: p["i2t"].mean(0))
    if axis == "token":
        low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
        maps = (maps - low) / (high - low + 1e-6)
    else:
        maps = unit_range(maps.T).T
    shares = np.exp(maps) / np.exp(maps).sum(0)
    want = merged(list(shares.T), tau)
    close(scores("seg4diff-unsup", one, tau=tau, axis=axis, kinds="all"), np.stack(want))


def test_seg4diff_unsup_by_hand() -> None:
    """Tokens 1 and 2 have one map, token 3 the opposite: two proposals; BOS proposes only where every kind does."""
    i2t = np.array([[0.5, 0.2, 0.2, 0.1], [0.5, 0.1, 0.1, 0.2]])
    one = Capture.of((2, 1), i2t=i2t, kinds=["bos", "pad", "pad", "eos"])
    assert scores("seg4diff-unsup", one).argmax(0).tolist() == [0, 1] and len(scores("seg4diff-unsup", one)) == 2
    assert len(scores("seg4diff-unsup", one, kinds="all", axis="none", tau=0.0)) == 4


@pytest.mark.parametrize("tau", [(0.5, 0.5, 0.5), (0.9, 0.3), (0.2, 0.6, 0.1), (0.4,)])
def test_diffseg_has_a_threshold_per_round(tau: tuple[float, ...]) -> None:
    h, w, side = 5, 9, 4
    block = joint(4, h, w)[2]["i2i"]
    maps = block.mean(0)
    maps = maps / maps.sum(1, keepdims=True)
    rows = [0, 1, 2, 3]  # (5 - 1) // (4 - 1) = 1, centred: start (4 - 3) // 2 = 0
    columns = [1, 3, 5, 7]  # (9 - 1) // 3 = 2, start (8 - 6) // 2 = 1
    anchors = [maps[y * w + x] for y in rows for x in columns]
    found = [np.mean([m for m in maps if m is a or distance(a, m) < tau[0]], axis=0) for a in anchors]
    for threshold in tau[1:]:
        found = merged(found, threshold)
    one = Capture.of((h, w), i2i=block)
    close(scores("diffseg", one, tau=tau, anchors=side), np.stack(found))
    if len(set(tau)) == 1:
        close(scores("diffseg", one, tau=tau[0], rounds=len(tau), anchors=side), np.stack(found))
    with pytest.raises(UserError, match=f"{len(tau)} threshold{'s' * (len(tau) > 1)} for 9 rounds"):
        scores("diffseg", one, tau=tau, rounds=9)


def cut(affinity: np.ndarray, nodes: list[int], tau: float) -> list[list[int]]:
    """Recursive normalised cut by the indicator form z'(D - A)z / z'Dz of Shi and Malik, all eigenvectors."""
    if len(nodes) == 1:
        return [nodes]
    a = affinity[np.ix_(nodes, nodes)]
    d = np.diag(a.sum(1))
    half = np.diag(a.sum(1) ** -0.5)
    y = half @ np.linalg.eigh(half @ (d - a) @ half)[1][:, 1]
    y = y * np.sign(y[np.abs(y).argmax()])
    best, side = np.inf, None
    for threshold in np.linspace(0.99 * y.min(), 0.99 * y.max(), 100):
        x = np.where(y > threshold, 1.0, -1.0)
        share = d.diagonal()[x > 0].sum() / d.sum()
        if 0 < share < 1:
            z = (1 + x) - share / (1 - share) * (1 - x)
            value = z @ (d - a) @ z / (z @ d @ z)
            if value < best - 1e-12:
                best, side = value, x > 0
    if side is None or best >= tau:
        return [nodes]
    parts = [[n for n, s in zip(nodes, side, strict=True) if s == want] for want in (True, False)]
    return [group for part in parts for group in cut(affinity, part, tau)]


@pytest.mark.parametrize(("seed", "tau", "alpha"), [(5, 0.5, 10.0), (6, 0.7, 5.0), (7, 0.85, 3.0)])
def test_diffcut(seed: int, tau: float, alpha: float) -> None:
    h, w = 4, 7
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (5, 6))[rng.integers(0, 5, h * w)] + 0.3 * rng.normal(0, 1, (h * w, 6))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    affinity = unit @ unit.T
    affinity = ((affinity - affinity.min()) / (affinity.max() - affinity.min())) ** alpha
    groups = sorted(cut(affinity, list(range(h * w)), tau), key=min)
    one = Capture.of((h, w), features=features)
    clusters = scores("diffcut", one, tau=tau, alpha=alpha, output="clusters")
    assert [np.flatnonzero(row).tolist() for row in clusters] == [sorted(group) for group in groups] and len(groups) > 2
    centres = np.stack([unit[group].mean(0) for group in groups])
    close(scores("diffcut", one, tau=tau, alpha=alpha), centres @ unit.T)


def test_diffcut_parts_a_group_of_two() -> None:
    """Orthogonal tokens: affinity 1 to oneself and 0 to the other, a cut of 0: each is a segment of its own."""
    one = Capture.of((1, 2), features=np.eye(2))
    assert scores("diffcut", one, output="clusters").tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_diffcut_centres_are_means_of_unit_features() -> None:
    """A wide cluster has a short mean, so a token between the clusters goes to the narrow one."""
    angles = np.deg2rad([0, 0, 0, 90, 170])
    unit = np.stack([np.cos(angles), np.sin(angles)], 1)
    one = Capture.of((1, 5), features=3.0 * unit)
    clusters = scores("diffcut", one, output="clusters")
    groups = [np.flatnonzero(row).tolist() for row in clusters]
    assert groups == [[0, 1, 2], [3, 4]] or [0, 1, 2] in groups
    want = np.stack([unit[group].mean(0) for group in groups]) @ unit.T
    close(scores("diffcut", one), want)
    assert np.linalg.norm(unit[[3, 4]].mean(0)) < 0.8


# one's own tensors


def test_shapes_are_checked() -> None:
    for given, message in [
        ({"i2t": np.ones((5, 3)) / 9}, r"i2t of shape \(5, 3\): expected \[6, T\]"),
        ({"i2i": np.ones((6, 5))}, r"i2i of shape \(6, 5\)"),
        ({"features": np.ones((3, 2, 4))}, r"features of shape .* \[2, 3, E\]"),
        ({"features": np.full((6, 4), np.nan)}, "not finite"),
        ({"i2t": np.ones((6, 3)), "spans": {"cat": [3]}}, r"positions \[3\] lie outside the text's 0\.\.2"),
        ({"i2t": np.ones((6, 3)), "kinds": ["pad"]}, "1 span kinds for 3 text positions"),
        ({"regions": np.zeros((3, 2), int)}, "expected whole ids"),
        ({"regions": np.full((2, 3), 0.5)}, "expected whole ids"),
        ({"image": np.zeros((4, 4, 3))}, "expected uint8"),
        ({"i2t": {0: np.ones((6, 3))}, "i2i": {1: np.ones((6, 6))}}, "give the same to all"),
        ({"i2t": {0: np.ones((6, 3)), 1: np.ones((6, 4))}}, r"of \[3, 4\] text positions"),
        ({"i2t": np.ones((6, 3)), "i2t_logit": np.ones((6, 4))}, r"of \[3, 4\] text positions"),
        ({"i2t": np.ones((6, 3)).astype(object)}, "i2t cannot be read: .* expected a dense array or tensor of real"),
        ({"i2t": [[1, 2], [1]]}, "i2t cannot be read"),
        ({"i2t": "abc"}, "i2t cannot be read"),
        ({"i2t": np.ones((6, 3), complex)}, "i2t is a tensor of torch.complex128"),
        ({"i2t": torch.ones(6, 3, device="meta")}, "i2t is a tensor without contents"),
        ({"i2t": torch.eye(6, 3).to_sparse()}, "i2t is a tensor of .* torch.sparse_coo"),
        ({"i2t": np.ones((6, 3)), "spans": ["cat"]}, "spans: expected class name -> its text positions"),
        ({"i2t": np.ones((6, 3)), "spans": {"cat": "12"}}, "spans: expected class name"),
        ({"i2t": np.ones((6, 3)), "spans": {"cat": None}}, "spans: expected class name"),
        ({"i2t": np.ones((6, 3)), "spans": {"cat": [1.5]}}, "spans: expected class name"),
        ({"i2t": np.ones((6, 3)), "spans": {3: [1]}}, "spans: expected class name"),
        ({"i2t": np.ones((6, 3)), "kinds": ["noun"] * 3}, "unknown span kind 'noun'"),
        ({"concepts": np.ones((2, 4)), "spans": {"cat": []}}, "2 concepts for 1 name in spans"),
        ({"concepts": np.ones((1, 4)), "features": np.ones((6, 5)), "spans": {"cat": []}}, "5 channels, concepts 4"),
    ]:
        with pytest.raises(UserError, match=message):
            Capture.of((2, 3), **given)
    for grid in (6, None, (2, 3, 1), (2.0, 3.0), (0, 6), (-2, -3), "23"):
        with pytest.raises(UserError, match=r"grid is .*; expected \(h, w\)"):
            Capture.of(grid, i2t=np.ones((6, 3)))
    turned = Capture.of((2, 3), i2t=pd.DataFrame(np.arange(18.0).reshape(6, 3))[::-1], spans={"cat": [1]})
    assert METHODS["seg4diff"](turned).flatten().tolist() == [16, 13, 10, 7, 4, 1]
    one = Capture.of((2, 3), i2t=torch.ones(6, 3), spans={"cat": [], "sky": [1]})
    with pytest.raises(UserError, match="'cat' has no text positions; name at least one in spans"):
        METHODS["seg4diff"](one)
    with pytest.raises(UserError, match="the capture has none"):
        METHODS["proxyclip"](Capture.of((2, 3), features=np.eye(6), spans={"cat": []}))


PARTS = {
    "i2t": np.full((6, 4), 0.1), "i2t_logit": np.zeros((6, 4)), "i2i": np.full((6, 6), 0.1),
    "features": np.eye(6), "concepts": np.eye(6)[:1],
}  # fmt: skip
READS = {
    "seg4diff": ("i2t",), "diffsegmenter": ("i2t", "i2i"), "diffsegmenter-per-class": ("i2t", "i2i"),
    "iseg": ("i2t", "i2i"), "tokenrank": ("i2t", "i2i"), "conceptattention": ("features", "concepts"),
    "proxyclip": ("features",), "corrclip": ("features",), "seg4diff-unsup": ("i2t",), "diffseg": ("i2i",),
    "diffcut": ("features",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "missing"), [(name, part) for name in METHODS for part in READS[name]])
def test_the_advice_for_own_tensors_is_what_their_owner_can_do(name: str, missing: str) -> None:
    """Each part that a method reads, left out: it names the argument of Capture.of, not an option of a capture."""
    parts = {part: value for part, value in PARTS.items() if part != missing}
    one = Capture.of(
        (2, 3), spans={"cat": [1]}, kinds=None if missing == "i2t" else ["bos", "word", "pad", "eos"], **parts
    )
    options = {"clip": ClipInput(text=torch.ones(1, 2), features=torch.ones(2, 3, 2))} if "clip" in name else {}
    options |= {"weights": (0, 0)} if name == "corrclip" else {}
    method = METHODS[name].configure(options)
    with pytest.raises(UserError, match=rf"this reads {missing}, and .* pass {missing}= to Capture\.of"):
        method(one)
    assert torch.isfinite(method(Capture.of((2, 3), spans={"cat": [1]}, **PARTS))).all()
    learned = {part: torch.as_tensor(value, dtype=torch.bfloat16).requires_grad_() for part, value in PARTS.items()}
    found = method(Capture.of((2, 3), spans={"cat": [1]}, **learned))
    assert torch.isfinite(found).all() and not found.requires_grad


def test_the_advice_for_a_captured_forward_is_of_the_capture() -> None:
    with pytest.raises(RunError, match="layer 3: concepts was not captured; pass keep='concepts' to capture"):
        JointRecord(3).part("concepts")
    blank = Capture.of((2, 3), i2t=np.full((6, 4), 0.1))
    for name, method in METHODS.items():
        if not method.unsupervised:
            with pytest.raises(UserError, match=rf"{name} needs class names.*spans= of Capture\.of"):
                method(blank)


def test_every_method_says_what_it_reads() -> None:
    """A capture that holds only what a method says it needs is enough for it."""
    parts, grid = joint(8, 3, 4), (3, 4)
    for name, method in METHODS.items():
        if "clip" in name:
            continue
        one = capture_of(parts, grid)
        for record in one.passes[0].records.values():
            for part in record.PARTS:
                if part not in method.needs:
                    setattr(record, part, None)
        assert torch.isfinite(method(one)).all(), name
