"""The report: one page of all parts, resumable, on a model that knows no scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmdit_probe import MMDiT, UserError
from mmdit_probe.experiments import Report, Result
from mmdit_probe.results.selection import LayerSelection
from tests import tiny
from tests.tables import unexplained

PARTS = ["attention-budget", "value-norms", "perturb", "select-layers", "maps", "explore"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    _report().run(_model(), path, progress=False)
    return path


def _model() -> MMDiT:
    return MMDiT(tiny.pipeline("sd3"), "tiny", tiny.T5_LENGTH)


def _report() -> Report:
    prompts = ["a red ring", "a cat", "a blue house", "a ring on grass"]
    return Report(prompts=prompts, limit=5, num_steps=2, guidance=2.0)


def test_every_part_is_a_section(folder: Path) -> None:
    html = (folder / "index.html").read_text("utf-8")
    for title in (
        "Attention budget",
        "Contribution",
        "Perturbation",
        "Which layers ground words",
        "Word maps",
        "Provenance",
    ):
        assert f"{title}" in html
    assert "Claim: " in html and "uniform attention in all layers" in html and "stability over resampled items" in html
    assert _model().weight_hash in html and "torch" in html and "PCA of" not in html
    assert html.count("data:image/png") >= 5 and 'href="explore.html"' in html
    assert (folder / "explore.html").exists() and "n = 4 prompts, at most 5 pictures" in html


def test_parts_are_run_folders_of_their_own(folder: Path) -> None:
    result = Result.read(folder)
    assert list(result.table["part"]) == PARTS
    chosen = LayerSelection.read(folder / "state" / "select-layers" / "selection.json").layers
    maps = Result.read(folder / "state" / "maps")
    assert maps.request["layers"] == sorted(chosen)
    assert len(maps.request["items"]) == 3


def test_photos_are_told_by_what_they_hold(tmp_path: Path) -> None:
    """A finished report was shown again for a folder whose photos had been exchanged."""
    ask = Report(prompts=["a red ring"], images=str(tmp_path), limit=4)
    told = []
    for shade in (0, 9, 0):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / "a.png")
        told.append(ask.prepare(_model(), ask.gather(False)).facts["contents"][str(tmp_path)])
    assert told[0] == told[2] != told[1]


def test_it_is_continued_without_doing_anything_again(folder: Path) -> None:
    before = (folder / "state" / "perturb" / "run.json").stat().st_mtime_ns
    table = folder / "parts.parquet" / "000003.parquet"
    table.unlink()
    record = (folder / "run.json").read_text().replace('"finished"', '"interrupted"')
    (folder / "run.json").write_text(record)
    result = _report().run(_model(), folder, resume=True, progress=False)
    assert unexplained(result) == set()
    assert list(result.table["part"]) == PARTS
    assert (folder / "state" / "perturb" / "run.json").stat().st_mtime_ns == before


def test_a_copy_holds_its_parts(folder: Path, tmp_path: Path) -> None:
    copy = Result.read(Result.read(folder).save(tmp_path / "copy"))
    assert copy.texts()[:-1] == Result.read(folder).texts()[:-1]
    assert (tmp_path / "copy" / "index.html").read_text("utf-8") == (folder / "index.html").read_text("utf-8")


def test_a_prompt_without_words_is_refused_before_the_first_part() -> None:
    with pytest.raises(UserError, match="prompt '!' has no word to look for"):
        Report(prompts=["!", "a cat", "a ring", "a dog"]).gather(False)


def test_a_prompt_that_is_too_long_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is longer than the text encoders: .* fell off; shorten it"):
        Report(prompts=["a cat", "a ring and " * 9]).run(_model(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_layers_are_not_reported_on_what_they_were_selected_on(tmp_path: Path) -> None:
    """Captions of test scenes went on as texts, which nobody could tell; pictures of test ended the report late."""

    def reported(**given: str) -> str:
        select = next(part for part in Report(**given).parts(True, ["a red ring"]) if part.name == "select-layers")
        return select.make(tmp_path).report  # type: ignore[attr-defined, no-any-return]

    assert reported() == reported(prompts="scenes:val", images="scenes:train") == "test"
    assert reported(prompts="scenes:test") == reported(images="scenes:test") == "train"
    with pytest.raises(UserError, match="none are left to report on"):
        Report(prompts="scenes:test", images="scenes:train").gather(True)
