"""Captions of scenes: a small grammar that is written from a scene and parses back into the facts that must hold.

    caption   := "" | classes | [things] [place]
    classes   := noun-or-stuff { noun-or-stuff }                  "house ring grass"
    things    := group { ("and" | relation) group }               "a red ring left of a blue house and a star"
    group     := "a" [colour] noun | count [colour] plural        "two yellow stars"
    place     := ["on"] ground ["under" "sky"]                    "on grass under sky"
    relation  := "left of" | "right of" | "above" | "below"

The categories follow T2I-CompBench++ (arXiv 2307.06350): colour, shape, texture, 2D-spatial, numeracy, complex; besides
them there are bare class lists and the empty caption.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from mmdit_probe.errors import UserError, check_known, unknown
from mmdit_probe.scenes.world import CLASSES, COLOUR_NAMES, GROUNDS, THINGS, Scene, SceneObject, scene

CATEGORIES: tuple[str, ...] = ("colour", "shape", "texture", "2d-spatial", "numeracy", "complex")
"""Categories that are scored. ``KINDS`` adds the two that are only written."""
KINDS: tuple[str, ...] = (*CATEGORIES, "list", "empty")

COUNTS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WRONG = {1: 1, 2: 3, 3: 2, 4: 3}
"""Count -> the count that its opposite states; one stays, since "a" says nothing of others."""
PLURALS: dict[str, str] = {noun: noun + ("es" if noun == "cross" else "s") for noun in THINGS}

WORDS: tuple[str, ...] = (
    *CLASSES,
    *PLURALS.values(),
    *COLOUR_NAMES,
    *COUNTS.values(),
    *("a", "and", "on", "under", "left", "right", "of", "above", "below"),
)
"""Every word that the grammar can write."""

RELATION_MARGIN = 0.1
"""Least distance of two centres along the axis of a relation, as a share of the side."""


@dataclass(frozen=True)
class Group:
    """Objects named together: how many, what, and in which colour (None: not said)."""

    count: int
    noun: str
    colour: str | None

    def __str__(self) -> str:
        words = [COUNTS[self.count] if self.count > 1 else "a", self.colour, None]
        words[2] = PLURALS[self.noun] if self.count > 1 else self.noun
        return " ".join(w for w in words if w)


@dataclass(frozen=True)
class Facts:
    """What a caption claims. ``relations`` are (index of group, relation, index of group)."""

    groups: tuple[Group, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    grounds: tuple[str, ...] = ()

    def __str__(self) -> str:
        joined = {(a, b): relation for a, relation, b in self.relations}
        text = ""
        for i, group in enumerate(self.groups):
            text += f" {joined.get((i - 1, i), 'and')} " if i else ""
            text += str(group)
        place = " under ".join(self.grounds)
        return f"{text} on {place}" if text and place else text or place


def holds(relation: str, first: tuple[float, float], second: tuple[float, float], margin: float) -> bool:
    """Whether ``first`` stands in ``relation`` to ``second``; centres (x, y) and margin in one unit, y downwards."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
    if relation not in along:
        raise unknown("relation", relation, list(RELATIONS))
    return along[relation] >= margin


def groups_of(objects: tuple[SceneObject, ...], coloured: bool) -> tuple[Group, ...]:
    """Objects of one noun (and one colour, when ``coloured``) gathered into groups, in order of first appearance."""
    counts = Counter((o.noun, o.colour if coloured else None) for o in objects)
    return tuple(Group(n, noun, colour) for (noun, colour), n in counts.items())


def describe(item: Scene, kind: str | None = None, seed: int | None = None) -> str:
    """A true caption of a scene.

    Args:
        item: the scene.
        kind: one of ``KINDS``; None draws one that fits (never "empty").
        seed: which of the possible captions; None takes the scene's own.

    Returns:
        The caption. A kind that the scene cannot show (a relation with one object) falls back to "colour".

    Raises:
        UserError: unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise unknown("caption kind", kind, list(KINDS))
    rng = np.random.Generator(np.random.PCG64(item.caption_seed if seed is None else [item.caption_seed, seed]))
    kind = kind or KINDS[int(rng.integers(0, len(KINDS) - 1))]
    if kind == "empty":
        return ""
    if kind == "list":
        names = item.class_names
        return " ".join(names[int(i)] for i in _shuffled(rng, len(names)))
    if kind == "texture":
        return str(Facts(grounds=item.grounds))
    coloured = kind != "shape"
    groups = [groups_of(item.objects, coloured)[int(i)] for i in _shuffled(rng, len(groups_of(item.objects, coloured)))]
    relations: list[tuple[int, str, int]] = []
    if kind in ("2d-spatial", "complex"):
        relations = _true_relations(item, groups)
        if relations:
            first, relation, second = relations[int(rng.integers(0, len(relations)))]
            rest = [g for i, g in enumerate(groups) if i not in (first, second)]
            groups = [groups[first], groups[second], *rest]
            relations = [(0, relation, 1)]
    if kind == "numeracy":
        groups = sorted(groups, key=lambda g: -g.count)
    place = item.grounds if kind == "complex" or int(rng.integers(0, 10)) < 8 else ()
    if kind in ("2d-spatial", "numeracy"):
        groups = groups[:2]
    return str(Facts(tuple(groups), tuple(relations), place))


def _shuffled(rng: np.random.Generator, n: int) -> list[int]:
    """A permutation by sorting raw draws (the order of ``Generator.permutation`` is not promised across versions)."""
    keys = rng.random(n)
    return sorted(range(n), key=lambda i: keys[i])


def _true_relations(item: Scene, groups: list[Group]) -> list[tuple[int, str, int]]:
    """Relations that hold between two groups of one object each, by more than the margin."""
    side = item.image.shape[0]
    centres = {
        i: next(o.centre for o in item.objects if (o.noun, o.colour) == (g.noun, g.colour))
        for i, g in enumerate(groups)
        if g.count == 1
    }
    return [
        (i, relation, j)
        for i in centres
        for j in centres
        for relation in RELATIONS
        if i != j and holds(relation, centres[i], centres[j], 1.5 * RELATION_MARGIN * side)
    ]


def parse(caption: str) -> Facts:
    """The facts that a caption claims; the inverse of ``str(Facts)``.

    A bare class list claims one object of each noun in no colour, and its stuffs as grounds.

    Raises:
        UserError: a word or an order that the grammar does not have; the message names the word.
    """
    words = caption.lower().split()
    for word in words:
        check_known("caption word", word, WORDS)
    if words and all(word in CLASSES for word in words):
        return Facts(
            groups=tuple(Group(1, w, None) for w in words if w in THINGS),
            grounds=tuple(w for w in words if w not in THINGS),
        )
    return _Reader(words, caption).read()


CONTRASTS = {"relation": "opposite_relation", "count": "wrong_count", "colours": "swapped_colours"}
"""What a caption may state -> its opposite, by its name in `opposites`."""
STATED = tuple(name for pair in CONTRASTS.items() for name in pair)
"""What captions state and its opposite, one after the other."""


def opposites(caption: str) -> dict[str, str]:
    """The caption with one thing turned round that it states; what it does not state is left out.

    Returns: ``opposite_relation`` (left for right, above for below), ``wrong_count`` (three for two, two for three,
    three for four), ``swapped_colours`` (of the first two groups for which that says something else).

        >>> opposites("a red ring left of a blue house")["swapped_colours"]
        'a blue ring left of a red house'
    """
    facts = parse(caption)
    turned = {
        "opposite_relation": replace(facts, relations=tuple((a, OPPOSITE[of], b) for a, of, b in facts.relations)),
        "wrong_count": replace(facts, groups=tuple(replace(g, count=WRONG[g.count]) for g in facts.groups)),
        "swapped_colours": replace(facts, groups=_swapped(facts.groups)),
    }
    return {name: str(other) for name, other in turned.items() if other != facts}


def _swapped(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups with two colours exchanged, if there are two that would not name the same things again."""
    for a, first in enumerate(groups):
        for b in range(a + 1, len(groups)):
            second, found = groups[b], list(groups)
            found[a], found[b] = replace(first, colour=second.colour), replace(second, colour=first.colour)
            new = set(found) != set(groups) and len(set(found)) == len(groups)
            if new and None not in (first.colour, second.colour):
                return tuple(found)
    return groups


def is_caption(text: str) -> bool:
    """Whether a text is a caption of this world, with facts that can be looked for in an image."""
    try:
        parse(text)
    except UserError:
        return False
    return True


class _Reader:
    """Recursive descent over the words of one caption."""

    def __init__(self, words: list[str], caption: str) -> None:
        self.words, self.caption, self.at = words, caption, 0

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self, *allowed: str) -> str:
        word = self.peek()
        if word not in allowed:
            found = f"'{word}'" if word else "the end"
            raise UserError(f"caption '{self.caption}': found {found}, expected one of: {', '.join(allowed)}")
        self.at += 1
        return word

    def read(self) -> Facts:
        groups: list[Group] = []
        relations: list[tuple[int, str, int]] = []
        if self.peek() not in ("", "on", *GROUNDS):
            groups.append(self.group())
            while self.peek() in ("and", "left", "right", "above", "below"):
                word = self.take("and", "left", "right", "above", "below")
                if word in ("left", "right"):
                    word += " " + self.take("of")
                if word != "and":
                    relations.append((len(groups) - 1, word, len(groups)))
                groups.append(self.group())
        grounds: tuple[str, ...] = ()
        if self.at < len(self.words):
            if groups:
                self.take("on")
            grounds = (self.take(*GROUNDS),)
            if self.peek() == "under":
                self.take("under")
                grounds += (self.take("sky"),)
        if self.at < len(self.words):
            raise UserError(f"caption '{self.caption}': found '{self.peek()}' after its end")
        return Facts(tuple(groups), tuple(relations), grounds)

    def group(self) -> Group:
        count = {"a": 1, **{word: n for n, word in COUNTS.items()}}[self.take("a", *COUNTS.values())]
        colour = self.take(*COLOUR_NAMES) if self.peek() in COLOUR_NAMES else None
        if count == 1:
            return Group(1, self.take(*THINGS), colour)
        singular = {plural: noun for noun, plural in PLURALS.items()}
        return Group(count, singular[self.take(*singular)], colour)


def captions(split: str, n: int, kind: str | None = None, *, distinct: bool = True) -> list[str]:
    """Captions of the first scenes of a split. The scenes of other splits are held out from training, not the captions:
    short ones come up in every split.

    Args:
        split: "train", "val" or "test".
        n: how many.
        kind: one of ``KINDS``, None for a mixture of all but "empty". Scenes that cannot show the kind are passed over.
        distinct: leave out repetitions; a kind with few captions (texture has eight) then cannot give many.

    Raises:
        UserError: the kind has fewer distinct captions than asked for.
    """
    found: list[str] = []
    seen: set[str] = set()
    for index in range(20 * n + 400):
        text = describe(scene(split, index), kind)
        if _shows(text, kind) and not (distinct and text in seen):
            found.append(text)
            seen.add(text)
        if len(found) == n:
            return found
    raise UserError(f"{n} distinct captions of kind '{kind}' asked for, this world has {len(found)}: ask for fewer")


def _shows(text: str, kind: str | None) -> bool:
    """Whether a caption has what its category is about (a relation, a count above one)."""
    if kind not in ("2d-spatial", "numeracy", "complex"):
        return True
    facts = parse(text)
    if kind == "2d-spatial":
        return bool(facts.relations)
    if kind == "numeracy":
        return any(g.count > 1 for g in facts.groups)
    return len(facts.groups) > 1 and bool(facts.grounds)
