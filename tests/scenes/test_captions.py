"""Captions: true of their scene, within the grammar, and parsed back into what they claim."""

import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.scenes import KINDS, THINGS, Facts, Group, captions, describe, parse, scene
from mmdit_probe.scenes.captions import RELATION_MARGIN, RELATIONS, WORDS, holds, opposites

SCENES = [scene("val", index) for index in range(120)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "list"])
def test_captions_parse_back_to_themselves(kind):
    for item in SCENES:
        text = describe(item, kind)
        assert str(parse(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_true(kind):
    for item in SCENES:
        facts = parse(describe(item, kind))
        named = {o.noun for o in item.objects}
        visible = set(item.class_names)
        assert set(facts.grounds) <= set(item.grounds)
        for group in facts.groups:
            matching = [o for o in item.objects if o.noun == group.noun and group.colour in (None, o.colour)]
            assert group.noun in named & visible
            assert len(matching) == group.count or kind == "list"
        for first, relation, second in facts.relations:
            a, b = (
                next(
                    o.centre
                    for o in item.objects
                    if (o.noun, o.colour) == (facts.groups[i].noun, facts.groups[i].colour)
                )
                for i in (first, second)
            )
            assert holds(relation, a, b, RELATION_MARGIN * 64)


def test_all_relations_counts_and_kinds_occur():
    texts = [describe(item) for item in SCENES]
    joined = " ".join(describe(item, "2d-spatial") for item in SCENES)
    assert all(relation in joined for relation in RELATIONS)
    assert any("two" in text for text in texts) and any("three" in text for text in texts)
    assert any(text and set(text.split()) <= {*THINGS, *scene("val", 0).grounds, *WORDS[:15]} for text in texts)


def test_another_seed_gives_another_true_caption():
    item = next(i for i in SCENES if len({(o.noun, o.colour) for o in i.objects}) > 2)
    assert len({describe(item, "complex", seed) for seed in range(12)}) > 3


def test_parse_reads_every_construct():
    assert parse("two yellow stars left of a house and a red ring on grass under sky") == Facts(
        groups=(Group(2, "star", "yellow"), Group(1, "house", None), Group(1, "ring", "red")),
        relations=((0, "left of", 1),),
        grounds=("grass", "sky"),
    )
    assert parse("") == Facts()
    assert parse("house ring grass") == Facts((Group(1, "house", None), Group(1, "ring", None)), (), ("grass",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red hous", "did you mean 'house'"),
        ("a red", "found the end"),
        ("two ring", "found 'ring', expected one of: .*rings"),
        ("a ring on sky", "found 'sky'"),
        ("a ring on grass on sand", "found 'on' after its end"),
        ("left of a ring", "found 'left'"),
    ],
)
def test_what_the_grammar_does_not_have_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_held_out_captions_are_distinct_unless_asked():
    assert len(set(captions("val", 50))) == 50
    assert len(captions("val", 30, "texture", distinct=False)) == 30
    assert all(parse(text).relations for text in captions("val", 20, "2d-spatial"))
    with pytest.raises(UserError, match="this world has 8"):
        captions("val", 30, "texture")


def test_unknown_kind_is_named():
    with pytest.raises(UserError, match="did you mean 'colour'"):
        describe(SCENES[0], "color")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("house ring grass", {}),
        ("a red ring on grass", {}),
        ("a red ring and a red house", {}),
        ("a red ring and a blue ring", {}),
        ("a red ring and a blue house and a blue ring", {}),  # exchanged, it would name a blue ring twice
        ("a ring above a house", {"opposite_relation": "a ring below a house"}),
        ("two stars and a ring on sand", {"wrong_count": "three stars and a ring on sand"}),
        ("three stars", {"wrong_count": "two stars"}),
        ("four red stars", {"wrong_count": "three red stars"}),
        (
            "a red ring left of a blue house and two green stars on grass under sky",
            {
                "opposite_relation": "a red ring right of a blue house and two green stars on grass under sky",
                "wrong_count": "a red ring left of a blue house and three green stars on grass under sky",
                "swapped_colours": "a blue ring left of a red house and two green stars on grass under sky",
            },
        ),
        ("a ring and two red stars and a blue house", {
            "wrong_count": "a ring and three red stars and a blue house",
            "swapped_colours": "a ring and two blue stars and a red house",
        }),
    ],
)  # fmt: skip
def test_opposites_turn_one_thing_round(text, expected):
    assert opposites(text) == expected


def test_opposites_are_captions_that_do_not_hold():
    for item in SCENES:
        for kind in ("2d-spatial", "numeracy", "complex"):
            text = describe(item, kind)
            for name, other in opposites(text).items():
                assert parse(other) != parse(text) and str(parse(other)) == other
                if name != "opposite_relation":
                    assert opposites(other)  # what was turned can be turned back
                else:
                    assert opposites(other)[name] == text
