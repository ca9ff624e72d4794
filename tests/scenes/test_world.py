"""Scenes: pure functions of their number, with masks that agree with each other and with the objects."""

import hashlib

import numpy as np
import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.scenes import (
    CLASSES,
    COLOUR_NAMES,
    COLOURS,
    GROUNDS,
    NO_COLOUR,
    PARTS,
    STUFF,
    THINGS,
    WORLD_VERSION,
    scene,
)
from mmdit_probe.scenes.shapes import OUTLINES, TEXTURES

SCENES = [scene("val", index) for index in range(60)]


def test_the_world_has_what_it_promises():
    composite = [noun for noun in THINGS if len(OUTLINES[noun](np.zeros((1, 1)), np.zeros((1, 1)))) > 1]
    assert len(THINGS) >= 10 and len(composite) >= 4 and len(COLOURS) >= 6 and len(GROUNDS) >= 4
    counts = [len(item.objects) for item in SCENES]
    assert set(counts) == {1, 2, 3, 4}
    assert {len(item.grounds) for item in SCENES} == {1, 2}


@pytest.mark.parametrize(
    ("split", "index", "digest"),
    [("train", 0, "691aa7744ca55a5f"), ("val", 7, "1d9aef4f608563be"), ("test", 123, "2cf040fbb701cd5b")],
)
def test_pixels_and_masks_never_change_within_a_world_version(split, index, digest):
    assert WORLD_VERSION == 1
    item = scene(split, index)
    content = item.image.tobytes() + item.classes.tobytes() + item.parts.tobytes() + item.instances.tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_splits_and_indices_give_different_scenes():
    images = [scene(split, index).image.tobytes() for split in ("train", "val", "test") for index in range(5)]
    assert len(set(images)) == len(images)


def test_masks_agree_with_each_other_and_with_the_objects():
    for item in SCENES:
        thing = item.classes < len(THINGS)
        assert np.array_equal(thing, item.instances > 0)
        assert np.array_equal(thing, item.colours != NO_COLOUR)
        assert {CLASSES[i] for i in np.unique(item.classes[~thing])} <= set(item.grounds)
        for number, placed in enumerate(item.objects, start=1):
            own = item.instances == number
            assert {CLASSES[i] for i in np.unique(item.classes[own])} == {placed.noun}
            assert {COLOUR_NAMES[i] for i in np.unique(item.colours[own])} == {placed.colour}
            parts = {PARTS[i] for i in np.unique(item.parts[own])}
            assert parts <= set(OUTLINES[placed.noun](np.zeros((1, 1)), np.zeros((1, 1))))
        assert {PARTS[i] for i in np.unique(item.parts[~thing])} <= set(STUFF)


def test_occlusion_hides_but_never_most_of_an_object():
    hidden = 0
    for item in SCENES:
        y, x = np.mgrid[0:64, 0:64] + 0.5
        for number, placed in enumerate(item.objects, start=1):
            u, v = (x - placed.centre[0]) / placed.radius, (y - placed.centre[1]) / placed.radius
            whole = np.logical_or.reduce(list(OUTLINES[placed.noun](u, v).values()))
            visible = item.instances == number
            assert not np.any(visible & ~whole)
            share = visible.sum() / whole.sum()
            assert share >= 0.35
            hidden += share < 1
    assert hidden > 5


def test_nouns_differ_by_texture_alone():
    y, x = np.mgrid[0:24, 0:24]
    spectra = {}
    for noun, texture in TEXTURES.items():
        field = texture(x, y, 0)
        spectrum = np.abs(np.fft.fft2(field - field.mean())) ** 2
        spectra[noun] = spectrum / spectrum.sum()
        assert field.std() > 0.05
    for a in THINGS:
        for b in THINGS:
            if a != b:
                assert np.abs(spectra[a] - spectra[b]).sum() > 0.4, (a, b)


def test_sky_lies_above_the_ground():
    stacked = [item for item in SCENES if "sky" in item.grounds]
    assert stacked
    for item in stacked:
        rows = [np.nonzero(item.classes == CLASSES.index(name))[0] for name in ("sky", item.grounds[0])]
        assert rows[0].max() < rows[1].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "vall", "index": 0}, "did you mean 'val'"),
        ({"split": "val", "index": -1}, "expected an integer from 0"),
        ({"split": "val", "index": 0, "objects": (0, 9)}, "within 1..4"),
    ],
)
def test_bad_requests_say_what_is_wrong(arguments, message):
    with pytest.raises(UserError, match=message):
        scene(**arguments)
