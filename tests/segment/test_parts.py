"""Vocabulary, geometry, tail and refinement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdit_probe.data import Fit, open_picture, parse_classes
from mmdit_probe.data.words import words
from mmdit_probe.errors import UserError
from mmdit_probe.models.tokens import Token, TokenTable
from mmdit_probe.segment.record import Capture
from mmdit_probe.segment.refine import PixelAffinity, Refinement, without_sinks
from mmdit_probe.segment.settings import Background
from mmdit_probe.segment.tail import label
from mmdit_probe.segment.vocabulary import pack
from tests.segment import worlds


def tables(limit: int):
    """Token tables of a made-up encoder: one token per letter group of a word of up to three letters."""

    def of(text: str) -> TokenTable:
        tokens = [Token("clip", "bos")]
        lost = []
        for index, (start, stop) in enumerate(words(text)):
            word, pieces = text[start:stop], [(at, min(at + 3, stop)) for at in range(start, stop, 3)]
            if len(tokens) + len(pieces) + 1 > limit:
                lost.append(word)
                continue
            tokens += [Token("clip", "word", word, index, *piece) for piece in pieces]
        tokens += [Token("clip", "eos")] + [Token("clip", "pad")] * (limit - len(tokens) - 1)
        return TokenTable(text, tuple(tokens), {"clip": tuple(lost)} if lost else {})

    return of


def test_classes_with_synonyms_and_several_words() -> None:
    classes = parse_classes(" cat; kitten,  wet  grass,sky")
    assert [one.synonyms for one in classes] == [("cat", "kitten"), ("wet grass",), ("sky",)]
    for bad in ("", "cat,,dog", "cat,cat", "cat; dog, dog"):
        with pytest.raises(UserError):
            parse_classes(bad)


def test_class_file(tmp_path) -> None:
    (tmp_path / "names.txt").write_text("cat; kitten\n\nsky\n", encoding="utf-8")
    assert [one.name for one in parse_classes(str(tmp_path / "names.txt"))] == ["cat", "sky"]
    with pytest.raises(UserError, match="no class file"):
        parse_classes(str(tmp_path / "other.txt"))


def test_spans_go_by_place_not_by_letters() -> None:
    one = pack(parse_classes("wet grass, grass, wet"), tables(20))[0]
    spans = [query.positions() for query in one.queries]
    assert spans == [[1, 2, 3], [4, 5], [6]]


def test_names_that_overflow_go_to_further_prompts() -> None:
    names = [f"n{i:02d}" for i in range(30)]
    prompts = pack(parse_classes(", ".join(names)), tables(10))
    assert len(prompts) > 1
    assert [query.text for one in prompts for query in one.queries] == names
    assert all(not one.table.truncated for one in prompts)
    assert len(pack(parse_classes("a, b, c"), tables(10), together=False)) == 3
    with pytest.raises(UserError, match="longer than a text encoder"):
        pack(parse_classes("a" * 60), tables(10))


def test_a_class_called_background_keeps_its_own_pixels() -> None:
    """Beside the background of a rule: areas are told by name, and one of the two was lost."""
    from mmdit_probe.segment.run import finish

    regions = worlds.masks()
    record = worlds.capture(regions)
    found = finish(record, regions[:2], ["cat", "background"], Refinement(), Background.parse("threshold:0.5"))
    assert found.names == ["cat", "background", "background 2"]
    counted = [int((found.labels == index).sum()) for index in range(3)]
    assert [area["pixels"] for area in found.areas().values()] == counted and sum(counted) == found.labels.size
    assert min(counted) > found.labels.size // 8


@pytest.mark.parametrize("how", ["squash", "letterbox", "crop", "aspect"])
@pytest.mark.parametrize("size", [(48, 160), (160, 48), (33, 77)])
def test_a_half_stays_a_half(how: str, size: tuple[int, int]) -> None:
    """A map whose right half is 1 comes back as a right half, whatever the fit (defect D20 of the official code)."""
    fit = Fit.of(size, (64, 64), 8, how)
    picture = np.zeros((*size, 3), np.uint8)
    picture[:, size[1] // 2 :] = 255
    seen = torch.from_numpy(np.array(fit.apply(picture))).float()[..., 0] / 255
    assert tuple(seen.shape) == fit.size
    scores = torch.nn.functional.adaptive_avg_pool2d(seen[None], (fit.size[0] // 8, fit.size[1] // 8))
    back = fit.back(scores)[0]
    assert tuple(back.shape) == size
    inside = ~fit.unseen
    right = torch.from_numpy(picture[..., 0] > 0)
    wrong = ((back > 0.5) != right).numpy() & inside
    assert wrong.sum() / inside.sum() < 0.08
    assert bool(fit.unseen.any()) == (how == "crop")


def test_bars_repeat_the_edge_of_a_label_map() -> None:
    """Four rows, doubled, in the middle of sixteen."""
    ids = np.repeat(np.arange(4)[:, None], 8, 1)
    found = Fit.of((4, 8), (16, 16), 8, "letterbox").masks(ids)
    rows = [0] * 4 + [0, 0, 1, 1, 2, 2, 3, 3] + [3] * 4
    assert np.array_equal(found, np.repeat(np.array(rows)[:, None], 16, 1))
    assert np.array_equal(Fit.of((8, 4), (16, 16), 8, "letterbox").masks(ids.T), found.T)


def test_fit_refuses() -> None:
    with pytest.raises(UserError, match="squash"):
        Fit.of((10, 10), (64, 64), 8, "sqash")
    with pytest.raises(UserError, match="multiples of 8"):
        Fit.of((10, 10), (60, 64), 8)


def test_pictures_that_cannot_be_read(tmp_path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="no picture"):
        open_picture(tmp_path / "b.png")


def test_background_rules() -> None:
    scores = torch.tensor([[[1.0, 0.0, 0.2]], [[0.0, 1.0, 0.3]]])
    assert label(scores).tolist() == [[0, 1, 1]]
    assert label(scores, Background.parse("threshold:0.5")).tolist() == [[0, 1, 2]]
    assert label(scores, Background.parse("power:1")).tolist() == [[0, 1, 2]]
    assert label(scores, Background.parse("power:20")).tolist() == [[0, 1, 1]]
    assert label(scores, Background.parse("class:b"), ["a", "b"]).tolist() == [[0, 2, 2]]
    with pytest.raises(UserError):
        label(scores, Background.parse("class:c"), ["a", "b"])
    with pytest.raises(UserError):
        Background.parse("treshold:1")


def test_affinity_repairs_holes_and_shuffled_affinity_does_not() -> None:
    regions = worlds.masks()
    one = worlds.capture(regions, sharp=0.95)
    generator = torch.Generator().manual_seed(3)
    broken = regions.clone() * (torch.rand(regions.shape, generator=generator) > 0.6)
    truth = regions.argmax(0)

    def right(scores: torch.Tensor) -> float:
        return float((scores.argmax(0) == truth).float().mean())

    step = Refinement.parse("affinity:1")
    assert right(step.on_grid(broken, one)) == 1.0 > right(broken)
    assert right(step.on_grid(broken, worlds.without_information(one))) < 0.8


def test_sinks_are_taken_out() -> None:
    block = torch.rand(16, 16) * 0.1 + torch.eye(16)
    block[:, 5] = 8.0
    kept = without_sinks(block)
    assert kept[:, 5].count_nonzero() == 1 and kept[5, 5] == 8.0
    assert torch.equal(kept[:, :5], block[:, :5])


def test_pamr_snaps_to_the_colours_and_keeps_constant_maps() -> None:
    image = np.zeros((32, 40, 3), np.uint8)
    image[:, 13:] = 255
    blurred = torch.linspace(0, 1, 40)[None, None].expand(1, 32, 40)
    maps = torch.cat([1 - blurred, blurred])
    pixels = PixelAffinity.of(image, (1, 2, 4))
    want = torch.from_numpy(image[..., 0] > 100).long()
    assert (pixels.spread(maps, 20).argmax(0) == want).float().mean() > (maps.argmax(0) == want).float().mean() + 0.1
    constant = torch.full((2, 32, 40), 0.5)
    assert torch.allclose(pixels.spread(constant, 3), constant, atol=1e-5)
    large = PixelAffinity.of(image.repeat(32, 0).repeat(32, 1))  # refined at 512 pixels, given back at full size
    assert max(large.weights.shape[1:]) == 512 and large.spread(torch.rand(2, 1024, 1280), 1).shape == (2, 1024, 1280)


def test_pamr_of_a_crop_is_that_of_the_part_that_is_shown() -> None:
    """What the crop cuts off had scores of 0, which spread into the part that was read: rules of background took it."""
    image, maps = np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8), torch.rand(2, 4, 4)
    pamr, shown = Refinement.parse("pamr"), np.s_[:, 4:12]
    part = Capture.of((4, 4), image=image[shown])
    found = pamr(maps, replace(part, picture=image, fit=Fit.of((8, 16), (4, 4), 1, "crop"), _derived={}))
    assert torch.equal(found[:, *shown], pamr(maps, part)) and not found[:, :, :4].any() and not found[:, :, 12:].any()


def test_pamr_is_the_mean_over_neighbours_written_out() -> None:
    rng = np.random.default_rng(0)
    image, maps = rng.integers(0, 255, (5, 6, 3)).astype(np.uint8), torch.rand(2, 5, 6)
    maps = maps / maps.sum(0)
    found = PixelAffinity.of(image, (1, 2)).spread(maps, 1)
    colours = image / 255.0
    y, x = 1, 4
    places = [(min(max(y + dy * d, 0), 4), min(max(x + dx * d, 0), 5))
              for d in (1, 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]  # fmt: skip
    around = np.stack([colours[p] for p in places])
    deviation = np.concatenate([around, colours[None, y, x]]).std(0, ddof=1)
    weights = np.exp(-(np.abs(around - colours[y, x]) / (1e-8 + 0.1 * deviation)).mean(1))
    weights /= weights.sum()
    want = sum(w * maps[:, p[0], p[1]].numpy() for w, p in zip(weights, places, strict=True))
    assert np.allclose(found[:, y, x].numpy(), want, atol=1e-5)


def test_refinement_names() -> None:
    assert Refinement.parse("affinity:3+pamr").steps == (("affinity", 3), ("pamr", 10))
    assert Refinement.parse("none").steps == () and Refinement.parse("pamr").keep == ()
    for bad in ("pamr+affinity", "afinity", "pamr:0", "affinity:x", "pamr:99999999999", "pamr:²"):
        with pytest.raises(UserError):
            Refinement.parse(bad)


@pytest.mark.parametrize("text", ["threshold:nan", "threshold:2", "threshold:-1", "power:-1", "power:", "power:inf"])
def test_background_rules_that_mean_nothing(text: str) -> None:
    with pytest.raises(UserError, match="background rule"):
        Background.parse(text)


def test_a_name_in_two_spellings_is_one_name() -> None:
    with pytest.raises(UserError, match="'CAT' is given twice"):
        parse_classes("cat; kitten, wet grass, CAT")


def test_aspect_stays_within_the_positions_of_the_network() -> None:
    assert Fit.of((3, 900), (64, 64), 8, "aspect").size == (8, 1112)
    assert Fit.of((3, 900), (64, 64), 8, "aspect", most=16).size == (8, 128)
    with pytest.raises(UserError, match="positions for 128 pixels a side"):
        Fit.of((3, 900), (256, 64), 8, "squash", most=16)
