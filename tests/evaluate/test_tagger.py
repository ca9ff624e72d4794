"""Taggers: thresholds from other images, quality counted by hand, the protocol from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmdit_probe.cli.app import main
from mmdit_probe.data import Dataset, Sample, SegClass, dataset as read_dataset
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.tagger import Tagging, choose_threshold, open_tagger, quality


def made_up(truth: list[list[int]]) -> Dataset:
    """Pictures that hold their number in every pixel."""
    classes = [SegClass((name,)) for name in "abc"]
    samples = [
        Sample(str(i), lambda i=i: np.full((2, 2, 3), i, np.uint8), label=lambda ids=ids: np.array([ids]))  # type: ignore[misc]
        for i, ids in enumerate(truth)
    ]
    return Dataset("made-up", classes, samples)


def test_the_threshold_is_the_one_with_the_best_f1() -> None:
    scores = np.array([[0.0, -0.1, -0.9], [-0.2, 0.0, -0.3], [-0.8, -0.7, 0.0]])
    dataset = made_up([[0, 1, 255], [0, 1, 1], [2, 2, 2]])
    threshold, found = choose_threshold(lambda image: scores[image[0, 0, 0]].copy(), dataset)
    assert threshold == -0.2 and (found.precision, found.recall, found.n) == (1.0, 1.0, 3)
    tagging = Tagging(dataset, lambda image: scores[image[0, 0, 0]].copy(), -0.75, None)
    counts = pd.DataFrame({"image": [0, 0, 1, 1, 2, 3], "truth": [0, 1, 0, 1, 2, 0], "pixels": [1, 1, 1, 1, 1, 0]})
    said = {"0": ["a", "b"], "1": ["a", "c"], "2": [], "3": ["b"]}  # of the last one nothing is known
    right = quality(said, counts, ["0", "1", "2", "3"], ["a", "b", "c"])
    assert right.n == 3 and right.per_image == pytest.approx(4 / 3)
    assert right.precision == pytest.approx(3 / 4) and right.recall == pytest.approx(3 / 5)
    assert right.f1 == pytest.approx(2 * 3 / (4 + 5))  # twice the hits over what is said and what is true
    assert tagging.threshold == -0.75


def test_tags_are_what_scores_above_the_threshold_which_is_chosen_once() -> None:
    dataset, others = made_up([[0], [1]]), made_up([[0, 1], [0, 1]])
    calls = []

    def tagger(image: np.ndarray) -> np.ndarray:
        calls.append(1)
        return np.array([0.0, -0.5, -1.0])

    assert Tagging(dataset, tagger, -0.5, None)[dataset[0].name] == ["a", "b"]
    assert Tagging(dataset, tagger, -0.1, None)[dataset[1].name] == ["a"] and len(calls) == 2
    chosen = Tagging(dataset, tagger, None, others)
    assert [chosen[sample.name] for sample in dataset] == [["a", "b"]] * 2 and len(calls) == 2 + 2 + 2
    assert chosen.about["threshold"] == -0.5 and chosen.about["chosen_on"] == "made-up"


def test_the_tags_of_a_run_stand_in_its_table(tiny_directory: Path, tmp_path: Path) -> None:
    from mmdit_probe.experiments import Evaluate, read

    asked = Evaluate(limit=2, protocol="predicted", tagger="scenes-parser", tag_threshold=-2.0, layers="0")
    found = asked.run(str(tiny_directory), out=tmp_path / "run", progress=False)
    assert set(found.data["contents"]) == {"scenes-parser"}  # another checkpoint under the name continues no run
    parser, val = open_tagger("scenes-parser", read_dataset("scenes:val", 2).classes), read_dataset("scenes:val", 2)
    want = {
        index: [one.name for one, score in zip(val.classes, parser(sample.image), strict=True) if score >= -2.0]
        for index, sample in enumerate(val)
    }
    tags = found.store.table("tags")
    assert {index: part["tag"].tolist() for index, part in tags.groupby("image")} == want
    about = read(tmp_path / "run").document()["tagger"]
    assert about["threshold"] == -2.0 and about["per_image"] == np.mean([len(names) for names in want.values()])


def test_the_shipped_taggers_beat_chance_on_scenes() -> None:
    val, train = (read_dataset(f"scenes:{split}", 24) for split in ("val", "train"))
    chance = np.mean([len(np.unique(sample.label())) for sample in val.samples]) / len(val.classes)
    for name, least in (("scenes-clip", chance + 0.1), ("scenes-parser", 0.8)):
        threshold, there = choose_threshold(open_tagger(name, train.classes), train)
        assert threshold <= 0 and there.recall > 0.3
        scores = [open_tagger(name, val.classes)(sample.image) >= threshold for sample in val.samples]
        truth = [np.isin(np.arange(15), sample.label()) for sample in val.samples]
        assert (np.array(scores) & np.array(truth)).sum() / np.array(scores).sum() > least
    with pytest.raises(UserError, match="embedded world only"):
        open_tagger("scenes-parser", [SegClass(("cat",))])


def test_the_parser_tags_pictures_of_other_sizes() -> None:
    """A scene that was enlarged holds what it held; sides that 8 does not divide ended in a Python error."""
    val = read_dataset("scenes:val", 1)
    tagger, image = open_tagger("scenes-parser", val.classes), val.samples[0].image
    large = image.repeat(2, 0).repeat(3, 1)[:, :-1]
    assert np.flatnonzero(tagger(large) > -2).tolist() == np.flatnonzero(tagger(image) > -2).tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--tagger CLIP"),
        (["--tag-threshold", "-0.1"], "name it with --tagger"),
        (["--tagger", "scenes-clip", "--tag-dataset", "scenes:val"], "choose the threshold on others"),
        (
            ["--tagger", "scenes-parser", "--dataset", "scenes", "--tag-dataset", "scenes:val"],
            "val:0 of 'scenes:val' is",
        ),
        (["--tagger", "scenes-clip", "--tag-dataset", "scenes:train", "--tag-threshold", "0"], "give one of them"),
        (["--tagger", "scenes-clip", "--protocol", "present"], "for --protocol predicted alone"),
        (["--tagger", "no/such-clip", "--tag-threshold", "0"], "cannot load the CLIP"),
        (["--tagger", "scenes-parzer", "--tag-threshold", "0"], "did you mean 'scenes-parser'?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, tiny_directory: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = ["evaluate", "--limit", "1", "--model", str(tiny_directory), *arguments]
    line += [] if "--protocol" in line else ["--protocol", "predicted"]
    with pytest.raises(SystemExit) as stop:
        main([*line, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
