"""What users may write for layers, steps and heads, and what they are told when it cannot be read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mmdit_probe.errors import UserError
from mmdit_probe.specs import (
    check_spec,
    head_indices,
    heads_at,
    layer_indices,
    listed,
    number,
    numbers,
    parse_size,
    seed_values,
    step_indices,
)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", tuple(range(12))), (" All ", tuple(range(12))), ("9", (9,)), (9, (9,)), ("7-11", (7, 8, 9, 10, 11)),
        ("0,9", (0, 9)), ("9, 0 ,7-8,8", (0, 7, 8, 9)), ([9, 0], (0, 9)), (range(2), (0, 1)), (np.int64(9), (9,)),
        (np.array([9, 0]), (0, 9)),
    ],
)  # fmt: skip
def test_layers(spec, expected):
    assert layer_indices(spec, 12) == expected


@pytest.mark.parametrize(
    ("spec", "expected"), [("last-8", (20,)), ("last", (27,)), ("last-28", (0,)), ("0,last-1", (0, 27))]
)
def test_steps_count_back_from_the_clean_end(spec, expected):
    assert step_indices(spec, 28) == expected


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_written_list_is_read_back(chosen):
    assert layer_indices(",".join(map(str, chosen)), 31) == tuple(sorted(chosen)) == layer_indices(chosen, 31)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_indices("12", 12), "layer 12 does not exist: there are 12 layers, 0 to 11"),
        (lambda: layer_indices(-1, 12), "layer -1 does not exist: there are 12 layers, 0 to 11"),
        (lambda: layer_indices("7-99999999999", 12), "layer 99999999999 does not exist"),
        (lambda: layer_indices("9-7", 12), "layer range '9-7' runs backwards; write 7-9"),
        (lambda: layer_indices("nine", 12), "cannot read 'nine' as a layer; expected all, 9, 7-11 or 0,9"),
        (lambda: layer_indices("1,,2", 12), "cannot read '' as a layer"),
        (lambda: layer_indices("last-1", 12), "cannot read 'last-1' as a layer"),
        (lambda: layer_indices([], 12), "no layer is named"),
        (lambda: layer_indices(math.nan, 12), "cannot read 'nan' as a layer"),
        (lambda: layer_indices([1, math.nan], 12), "cannot read 'nan' as a layer"),
        (lambda: layer_indices(9.0, 12), "cannot read '9.0' as a layer"),
        (lambda: layer_indices({4: [0, 2]}, 12), r"cannot read '\{4: \[0' as a layer"),  # heads of a layer
        (lambda: layer_indices(b"4", 12), "as a layer"),
        (lambda: seed_values(1 << 63, 1), r"seed 9223372036854775808: expected whole numbers from 0 to 2\^63"),
        (lambda: seed_values((1 << 63) - 1, 2), r"seed 9223372036854775808: expected whole numbers"),
        (
            lambda: check_spec("-1", head_indices),
            "head -1 does not exist: they count from 0",
        ),
        (lambda: parse_size("0x64"), "size '0x64': expected height x width in pixels"),
        (lambda: parse_size("64x8193", "--size"), "--size '64x8193': .*at most 8192 a side"),
        (lambda: seed_values(-1, 1), "seed -1: expected whole numbers from 0"),
        (lambda: seed_values([0, 1.5], 2), "seed 1.5: expected whole numbers"),
        (lambda: seed_values([1, 2, 3], 1, "picture"), "3 seeds for 1 picture; give one each"),
        (lambda: number("guidance", math.nan), "guidance nan: expected a finite number"),
        (lambda: number("guidance", -math.inf), "guidance -inf: expected a finite number"),
        (lambda: number("guidance", "7.5"), "guidance '7.5': expected a finite number"),
        (lambda: number("guidance", np.ones(2)), r"guidance array\(\[1., 1.\]\): expected a finite number"),
        (lambda: number("guidance", -1.0, 0.0), "guidance -1.0: expected a finite number from 0"),
        (lambda: number("sigma", 1.5, 0, 1), "sigma 1.5: expected a finite number from 0 to 1"),
        (lambda: step_indices("last-29", 28), "step 'last-29' does not exist: there are 28 steps"),
        (lambda: step_indices("last-0", 28), "step 'last-0' does not exist"),
        (lambda: step_indices("first", 28), "cannot read 'first' as a step; expected all, last-8, 20, 0-4 or 0,20"),
        (lambda: heads_at({"2": [0]}, 2, 4), "heads of layer '2': expected a whole number"),
        (lambda: head_indices("4", 4), "head 4 does not exist: there are 4 heads, 0 to 3"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_seeds_count_up_or_are_given():
    assert seed_values(3, 2) == [3, 4] and seed_values([7, np.int64(5)], 2) == [7, 5]
    assert seed_values((1 << 63) - 1, 1) == [(1 << 63) - 1] and seed_values(0, 0) == []
    assert number("sigma", 0, 0, 1) == 0.0 and number("sigma", 1, 0, 1) == 1.0


def test_what_is_listed_counts_once_in_order() -> None:
    assert (
        listed(" b,a , b,,") == ["b", "a", ""] and listed(["b ", "a", "b"]) == ["b", "a"] and listed([2.0]) == ["2.0"]
    )


def test_numbers_count_once_in_order() -> None:
    assert numbers("0.5, 0.3,0.50,5e-1", 0, 1, "no") == [0.5, 0.3] and numbers(2, 0, 2, "no") == [2.0]
    assert numbers([1, 2.0, 1.0], 1, 2, "no") == [1.0, 2.0]
    for asked in ("", "0.3,", "a", "nan", "-inf", "0.3,1.1", []):
        with pytest.raises(UserError, match=r"^no$"):
            numbers(asked, 0, 1, "no")
