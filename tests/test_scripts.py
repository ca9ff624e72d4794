"""Scripts beside the package: nonsense ends in one sentence, before anything is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdit_probe.errors import run_script
from tests.scripts import script

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for room in ("analyses", "benchmarks", "figures") for path in (ROOT / room).glob("*.py")
    if "def main()" in path.read_text(encoding="utf-8")
)  # fmt: skip
OF_FIGURES = [
    (["--model", "scenes-sd33"], "did you mean 'scenes-sd3'"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--set", "nonsense=1"], "unknown option"),
    (["--set", "nonsense"], "name=value"),
    (["--run", "gone"], "gone"),
]
NONSENSE = [
    *((name, *one) for name in ("fig02_attention_budget", "fig05_blur") for one in OF_FIGURES),
    *(("fig09_token_maps", *one) for one in OF_FIGURES[:-1]),
    ("fig03_pca", ["--images", "gone"], "no folder 'gone'"),
    ("fig07_masks", ["--dataset", "voc22:gone"], "unknown dataset 'voc22'"),
    ("fig08_segmentation", ["--dataset", "voc20:gone"], "no folder 'gone'"),
    ("fig09_token_maps", ["--layers", "x"], "cannot read 'x' as a layer"),
    ("fig09_token_maps", ["--layers", "99"], "layer 99 does not exist: there are 8 layers"),
    ("fig09_token_maps", ["--marked-prompts", "no brackets", "--layers", "1,2"], "brackets"),
    ("fig10_magnet", ["--lora", "gone", "--layers", "x"], "cannot read 'x' as a layer"),
    ("fig10_magnet", ["--lora", "gone"], "no LoRA 'gone'"),
    ("fig07_masks", ["--set", "limit=2"], "unrecognized arguments: --set"),
    ("fig10_magnet", ["--set", "limit=2"], "name one with --lora"),
    ("fig10_magnet", ["--lora", "x", "--run", "gone"], "with --lora leave it out"),
    ("fig10_magnet", ["--limit", "0"], "expected a whole number of at least 1"),
    ("fig_analyses", ["--set", "nonsense=1"], "unknown option"),
    ("fig_embedded_training", ["--out", "file"], "file"),
    ("make", ["--model", "scenes-sd33"], "did you mean 'scenes-sd3'"),
    ("paper_vs_measured", ["--model", "scenes-sd33"], "did you mean 'scenes-sd3'"),
    ("alignment_ablation", ["--samples", "0"], "expected a whole number of at least 1"),
    ("attribution", ["--split", "vall"], "unknown --split 'vall'"),
    ("embedded_model", ["--sigma", "7"], "expected noise levels in 0..1"),
    ("layer_evidence", ["--evidence", "masses"], "unknown evidence 'masses'"),
    ("magnet_scenes", ["--rates", "fast"], "--rates 'fast'"),
    ("presence", ["--dataset", "voc22:gone"], "unknown dataset 'voc22'"),
    ("segmentation_choice", ["--dataset", "scenes:vall"], "vall"),
    ("gpu", ["--out", "new", "--device", "gpu"], "unknown device 'gpu'"),
    ("mutants", ["run", "--share", "x"], "--share 'x'"),
    ("peers", ["--clones", "gone"], "no folder 'gone'"),
    ("scaling", ["--tokens", "5"], "square"),
    ("overhead", ["--device", "gpu"], "unknown device 'gpu'"),
]


def test_every_script_tells_what_cannot_be_met() -> None:
    for name in SCRIPTS:
        assert (ROOT / name).read_text(encoding="utf-8").rstrip().endswith("    run_script(main)"), name


@pytest.mark.parametrize(("name", "arguments", "words"), NONSENSE)
def test_nonsense_ends_in_one_sentence(
    name: str, arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (path,) = [path for path in SCRIPTS if Path(path).stem == name]
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(script(path).main)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code not in (0, None) and "error: " in last and words in last, last


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are run in forked processes")
def test_mutants_are_run_against_the_package_of_their_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "mmdit_probe").mkdir(parents=True)
    (tree / "mmdit_probe" / "__init__.py").write_text("LEFT = 'out'\n")
    (tree / "test_it.py").write_text("import mmdit_probe\ndef test_it():\n    assert mmdit_probe.LEFT == 'out'\n")
    run = (
        "import sys; from pathlib import Path; from tests.scripts import script; m = script('benchmarks/mutants.py');"
        f" place = Path({str(tmp_path)!r});"
        " sys.exit(m.forked(place, lambda: m.pytest_run(place / 'tree', ['test_it.py']), 60))"
    )
    assert subprocess.run([sys.executable, "-c", run], cwd=ROOT, check=False).returncode == 0
