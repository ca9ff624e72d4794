"""Reading label maps and checking captions against them, on exact masks; and the trained parser on held-out scenes."""

import numpy as np
import pytest
import torch

from mmdit_probe.evaluate import confusion, mean_iou
from mmdit_probe.scenes import CLASSES, NO_COLOUR, SceneObject, describe, load_parser, scene
from mmdit_probe.scenes.parser import (
    CONTRASTS,
    SCORES,
    SceneReading,
    SeenObject,
    aligned,
    alignment,
    check,
    judge,
    parse,
    read_maps,
    things_right,
    to_tensor,
)
from training.parser import disturb

SCENES = [scene("test", index) for index in range(100)]


def reading_of(item):
    return read_maps(
        item.classes.astype(np.int64), np.where(item.colours == NO_COLOUR, 0, item.colours).astype(np.int64)
    )


def test_exact_masks_read_back_as_the_objects():
    whole = 0
    for item in SCENES:
        seen = sorted((o.noun, o.colour) for o in reading_of(item).objects)
        whole += seen == sorted((o.noun, o.colour) for o in item.objects)
    assert whole >= 90  # an occluder may cut an object in two


def test_true_captions_hold_and_wrong_ones_do_not():
    right, wrong = 0, 0
    for item, other in zip(SCENES, SCENES[1:] + SCENES[:1], strict=True):
        reading = reading_of(item)
        right += aligned(describe(item, "complex"), reading)
        wrong += aligned(describe(other, "complex"), reading)
    assert right >= 88
    assert wrong <= 3


def test_each_kind_of_fact_is_checked():
    item = next(i for i in SCENES if len(i.objects) == 1)
    reading = reading_of(item)
    placed: SceneObject = item.objects[0]
    other = "red" if placed.colour != "red" else "blue"
    truth = f"a {placed.colour} {placed.noun} on {item.grounds[0]}"
    assert aligned(truth, reading) and alignment(truth, reading) == 1
    assert not things_right(f"a {other} {placed.noun}", reading)
    assert alignment(f"a {other} {placed.noun} on {item.grounds[0]}", reading) == 0.5
    assert not aligned(f"two {placed.colour} {placed.noun + ('es' if placed.noun == 'cross' else 's')}", reading)
    assert check(parse(""), reading) == {} and alignment("", reading) == 1


def test_relations_use_the_centres():
    item = next(i for i in SCENES if describe(i, "2d-spatial").count(" of ") == 1)
    text, reading = describe(item, "2d-spatial"), reading_of(item)
    swapped = text.replace("left of", "RIGHT").replace("right of", "left of").replace("RIGHT", "right of")
    assert aligned(text, reading) and not aligned(swapped, reading)


def test_pictures_of_any_sides_are_read():
    """Sides that 8 does not divide (`perturb --size 68x68`) ended in a Python error."""
    image = SCENES[0].image
    [reading] = load_parser().read(np.pad(image, ((0, 4), (0, 0), (0, 0)), "edge")[:, :60])
    assert reading.classes.shape == (68, 60)
    assert np.mean(reading.classes[:60, :56] == SCENES[0].classes[:60, :56]) > 0.9


def test_centres_are_shares_of_both_sides():
    classes = np.full((8, 16), CLASSES.index("sky"))
    classes[4:8, 12:16] = 0
    [thing] = read_maps(classes, np.zeros_like(classes)).objects
    assert thing.centre == (14 / 16, 6 / 8)


@pytest.mark.parametrize("spoiled", [False, True])
def test_trained_parser_reaches_95_percent_miou(spoiled):
    parser = load_parser()
    images = to_tensor([item.image for item in SCENES])
    torch.manual_seed(0)
    found, _ = parser.label(disturb(images) if spoiled else images)
    truth = np.stack([item.classes for item in SCENES])
    assert mean_iou(confusion(truth, found, len(CLASSES))) >= 0.95


def test_trained_parser_reads_captions_back():
    parser = load_parser()
    texts = [describe(item) for item in SCENES]
    readings = parser.read([item.image for item in SCENES])
    assert np.mean([aligned(text, reading) for text, reading in zip(texts, readings, strict=True)]) >= 0.85


def seen(*objects, grounds=("grass",)):
    """A reading of (noun, colour, x, y)."""
    none = np.zeros((8, 8), np.int64)
    return SceneReading(
        tuple(SeenObject(noun, colour, (x, y), 0.1) for noun, colour, x, y in objects), grounds, none, none
    )


RING, HOUSE = ("ring", "red", 0.2, 0.5), ("house", "blue", 0.8, 0.5)
NAN = float("nan")


@pytest.mark.parametrize(
    ("text", "reading", "relation", "count", "colours"),
    [
        ("a red ring left of a blue house", seen(RING, HOUSE), (1, 0), (NAN, NAN), (1, 0)),
        ("a red ring right of a blue house", seen(RING, HOUSE), (0, 1), (NAN, NAN), (1, 0)),
        # Side by side is neither above nor below, and a missing house stands nowhere.
        ("a red ring above a blue house", seen(RING, HOUSE), (0, 0), (NAN, NAN), (1, 0)),
        ("a red ring left of a blue house", seen(RING), (0, 0), (NAN, NAN), (0, 0)),
        # A blue ring and a red house: the colours are exchanged, so that the named things stand nowhere.
        (
            "a red ring left of a blue house", seen(("ring", "blue", 0.2, 0.5), ("house", "red", 0.8, 0.5)),
            (0, 0), (NAN, NAN), (0, 1),
        ),
        # Both pairs at once show what is stated and its opposite.
        (
            "a red ring and a blue house",
            seen(RING, HOUSE, ("ring", "blue", 0.2, 0.1), ("house", "red", 0.8, 0.1)), (NAN, NAN), (NAN, NAN), (1, 1),
        ),
        ("a ring left of a house", seen(RING, HOUSE), (1, 0), (NAN, NAN), (NAN, NAN)),
        ("two red rings", seen(RING, ("ring", "red", 0.8, 0.5)), (NAN, NAN), (1, 0), (NAN, NAN)),
        ("two red rings", seen(RING, RING, RING), (NAN, NAN), (0, 1), (NAN, NAN)),
        ("two red rings", seen(RING), (NAN, NAN), (0, 0), (NAN, NAN)),
        ("three red rings and a blue house", seen(RING, RING), (NAN, NAN), (0, 1), (0, 0)),
        ("a red ring on grass", seen(RING), (NAN, NAN), (NAN, NAN), (NAN, NAN)),
        ("", seen(), (NAN, NAN), (NAN, NAN), (NAN, NAN)),
    ],
)  # fmt: skip
def test_what_is_stated_stands_beside_its_opposite(text, reading, relation, count, colours):
    scores = judge(text, reading)
    assert tuple(scores) == SCORES
    found = [(scores[stated], scores[opposite]) for stated, opposite in CONTRASTS.items()]
    np.testing.assert_array_equal(found, [relation, count, colours])
    assert scores["facts"] == alignment(text, reading) and scores["things_right"] == things_right(text, reading)


def test_opposites_do_not_hold_in_scenes():
    scores = [judge(describe(item, kind), reading_of(item)) for item in SCENES for kind in ("2d-spatial", "numeracy")]
    for stated, opposite in CONTRASTS.items():
        right, wrong = (np.array([row[name] for row in scores]) for name in (stated, opposite))
        assert np.count_nonzero(~np.isnan(right)) >= 20
        assert np.nanmean(right) >= 0.9 and np.nanmean(wrong) <= 0.05


def test_things_named_twice_are_two():
    item = next(i for i in SCENES if len(i.objects) == 1)
    reading, one = reading_of(item), f"a {item.objects[0].colour} {item.objects[0].noun}"
    assert things_right(one, reading) and not things_right(f"{one} and {one}", reading)
