"""Options of a dataclass: types, choices and ranges are held to, and the refusal names the flag and the value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe.errors import UserError
from mmdit_probe.experiments import Generate
from mmdit_probe.options import Option, changed, check, described
from mmdit_probe.specs import layer_indices


@dataclass(frozen=True)
class Weights:
    focal: Annotated[float, Option("Weight.", min=0.0)] = 0.1


@dataclass(frozen=True)
class Recipe:
    steps: Annotated[int, Option("Steps.", min=1)] = 400
    seed: Annotated[int, Option("Seed.", max=2**62)] = 0
    rate: Annotated[float, Option("Learning rate.", above=0.0, max=1.0, flag="--learning-rate")] = 1e-4
    share: Annotated[float | None, Option("A share.", min=0.0, max=1.0)] = None
    space: Annotated[Literal["logit", "probability"], Option("Space.")] = "logit"
    report_to: Annotated[Literal["tensorboard", "wandb"] | None, Option("Tracker.")] = None
    sizes: Annotated[tuple[int, ...], Option("Sizes.", min=1)] = (1,)
    pair: tuple[int, str] = (1, "a")
    names: Annotated[Sequence[str], Option("Names.")] = ()
    layers: str | int | Iterable[int] = "all"
    on: bool = False
    out: Path | str | None = None
    file: Path | None = None
    more: Any = None
    table: Mapping[str, int] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)


@pytest.mark.parametrize(
    "change",
    [
        {}, {"steps": 10**7}, {"seed": 2**62},
        {"rate": 1}, {"rate": np.float32(0.5)}, {"steps": np.int64(3)}, {"share": 1.0}, {"report_to": "wandb"},
        {"sizes": (1, 2)}, {"names": ["a"]}, {"layers": [0, 1]}, {"layers": 4}, {"out": Path("x")}, {"more": object()},
    ],
)  # fmt: skip
def test_what_fits_passes(change: dict[str, Any]) -> None:
    check(replace(Recipe(), **change))


def test_numbers_of_numpy_become_those_of_a_record() -> None:
    recipe = Recipe(steps=np.int64(3), rate=np.float32(0.5), share=np.float64(0.25))
    check(recipe)
    assert json.dumps([recipe.steps, recipe.rate, recipe.share]) == "[3, 0.5, 0.25]"


@pytest.mark.parametrize("of", [np.array, torch.tensor, pd.Series])
def test_lists_of_arrays_and_tables_are_lists(of: Any) -> None:
    """They were refused with "expected a text", or layers of a tensor as a name that cannot be read."""
    recipe = Recipe(layers=of([3, 1]), steps=of(np.array([3]))[0], names=np.array(["a", "b"]))  # type: ignore[arg-type]
    check(recipe)
    assert json.dumps([recipe.layers, recipe.steps, recipe.names]) == '[[3, 1], 3, ["a", "b"]]'
    assert layer_indices(of([3, 1]), 4) == (1, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "--steps is 0; expected a whole number from 1 to 10000000"),
        ({"steps": 10**7 + 1}, "expected a whole number from 1 to 10000000"),
        ({"steps": 10**400}, "expected a whole number from 1 to 10000000"),
        ({"seed": 2**62 + 1}, "--seed is 4611686018427387905; expected a whole number at most 4611686018427387904"),
        ({"steps": 1.5}, "--steps is 1.5; expected a whole number"),
        ({"steps": True}, "--steps is True; expected a whole number"),
        ({"rate": 0.0}, "--learning-rate is 0.0; expected a finite number above 0 and at most 1"),
        ({"rate": float("nan")}, "--learning-rate is nan; expected a finite number"),
        ({"rate": float("inf")}, "--learning-rate is inf; expected a finite number"),
        ({"share": 1.1}, "--share is 1.1; expected a finite number from 0 to 1"),
        ({"space": "logits"}, "unknown --space 'logits': did you mean 'logit'? Known: logit, probability"),
        ({"space": 3}, "--space is 3; expected one of logit, probability"),
        ({"report_to": "wand"}, "unknown --report-to 'wand': did you mean 'wandb'?"),
        ({"sizes": (1, 0)}, "--sizes is (1, 0); expected a list, each a whole number from 1"),
        ({"sizes": (1, "a")}, "--sizes is"),
        ({"pair": (1, 2)}, "--pair is"),
        ({"pair": (1,)}, "--pair is"),
        ({"names": "abc"}, "--names is 'abc'; expected a list, each a text"),
        ({"names": b"abc"}, "--names is b'abc'; expected a list, each a text"),
        ({"names": b"abc"}, "--names is b'abc'; expected a list, each a text"),
        ({"layers": None}, "--layers is None; expected a whole number or a text, or a list of them"),
        ({"layers": [1.0]}, "--layers is [1.0]; expected a whole number or a text, or a list of them"),
        ({"steps": np.zeros((40, 40))}, "0 ...; expected a whole number from 1 to"),
        ({"file": 3}, "--file is 3; expected a path"),
        ({"on": 1}, "--on is 1; expected true or false"),
        ({"steps": Weights()}, "--steps is Weights(focal=0.1); expected a whole number from 1"),
        ({"weights": Recipe()}, "--weights is Recipe("),
        ({"weights": Weights(focal=-1.0)}, "--focal is -1.0; expected a finite number of at least 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        check(replace(Recipe(), **change))
    assert said in str(refused.value)


def test_an_iterator_is_read_once() -> None:
    recipe = Recipe(layers=iter([3, 1]))
    check(recipe)
    assert recipe.layers == [3, 1]
    with pytest.raises(UserError, match="expected a list, each a text"):  # such as an open file
        check(Recipe(names=iter(["a"])))  # type: ignore[arg-type]


def test_a_default_in_other_words_is_no_change() -> None:
    """`Generate(start=0, stop=1)` was refused as if it guided."""
    assert changed(Recipe(rate=1e-4, sizes=(1,), layers="all"), "rate", "sizes", "layers") is None
    assert changed(Recipe(layers="ALL", rate=1), "rate", "layers") == "--learning-rate"
    assert Generate(prompts="a ring", start=0, stop=1).stop == 1


def test_a_text_stands_for_a_path() -> None:
    """As a record holds it, and as one writes it in Python: it was refused with "expected nothing"."""
    written = Recipe(file="a.json", out="b")  # type: ignore[arg-type]
    check(written)
    assert written.file == Path("a.json") and written.out == "b"


def test_fields_are_described_in_order() -> None:
    fields = {each.name: each for each in described(Recipe)}
    assert list(fields)[:3] == ["steps", "seed", "rate"]
    assert fields["rate"].flag == "--learning-rate" and fields["report_to"].flag == "--report-to"
    assert fields["steps"].type is int and fields["steps"].option.help == "Steps."
    assert fields["on"].option == Option("")
