"""Training curves: layers can be told apart, opposites stand beside what is stated, what is missing is left out."""

import numpy as np
import pandas as pd

from mmdit_probe import assets
from tests.scripts import script

training_curves = script("figures/fig_embedded_training.py").training_curves


def frame(rows):
    return pd.DataFrame(rows, columns=["step", "name", "value"])


def titles(figure):
    return [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes if axis.axison and axis.get_xlabel()]


def test_maps_are_a_heat_map_with_a_dot_on_the_best_layer():
    values = np.array([[0.1, 0.3], [0.4, 0.2], [0.2, 0.5]])
    rows = [(1000 * (1 + k), f"miou@0.5/layer{layer}", values[layer, k]) for layer in range(3) for k in range(2)]
    rows += [(1000, "miou@0.5/head", 0.9), (1000, "flow", 1.0)]
    figure = training_curves(frame(rows))
    axis = next(axis for axis in figure.axes if axis.get_ylabel() == "layer")
    (mesh,), (dots,) = axis.collections, axis.lines
    np.testing.assert_allclose(mesh.get_array().reshape(3, 2), values)
    assert dots.get_xydata().tolist() == [[0.5, 1.5], [1.5, 2.5]]  # column, layer, each in the middle of its cell
    assert titles(figure) == ["training losses", "I2T maps at sigma 0.5", "what samples show"]


def test_gains_and_opposites_are_drawn_where_they_were_measured():
    rows = [(1000 * k, name, 0.1 * k) for k in (1, 2) for name in
            ("flow", "relation_wrong@0.85", "relation_wrong@0.5", "relation", "opposite_relation")]  # fmt: skip
    figure = training_curves(frame(rows))
    assert titles(figure) == [
        "training losses", "text gain: the opposite relation", "what samples show",
    ]  # fmt: skip
    gain, seen = figure.axes[1:3]
    assert [line.get_label() for line in gain.lines[:2]] == ["sigma 0.5", "sigma 0.85"]
    stated, opposite = seen.lines
    assert (stated.get_label(), opposite.get_label()) == ("relation", "its opposite")
    assert stated.get_color() == opposite.get_color() and stated.get_linestyle() != opposite.get_linestyle()


def test_the_curves_that_ship_can_be_drawn():
    figure = training_curves(pd.read_csv(assets.path("scenes-sd3") / "training" / "transformer.csv"))
    heats = [axis for axis in figure.axes if axis.get_ylabel() == "layer"]
    assert len(heats) == 2 and all(axis.collections[0].get_array().reshape(8, -1).shape[1] > 2 for axis in heats)
