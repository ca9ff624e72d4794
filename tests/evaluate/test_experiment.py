"""Evaluate, Segment and Discover as library calls: the command's results, papers' protocols by name, known layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmdit_probe.cli.app import main
from mmdit_probe.data.fit import HOW
from mmdit_probe.data.scenes import scene_sample, scenes
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate import plan
from mmdit_probe.evaluate.scores import MATCHES
from mmdit_probe.experiments import Discover, Evaluate, Experiment, Score, Segment, read
from mmdit_probe.experiments.evaluate import PROTOCOLS
from mmdit_probe.experiments.known import known_layers
from mmdit_probe.experiments.presets import PRESETS
from mmdit_probe.experiments.target import Named
from mmdit_probe.models.load import load
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.segment.methods import METHODS
from mmdit_probe.segment.record import Reading
from mmdit_probe.segment.settings import BLIND, NAMED, parse_steps
from tests import tiny

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def literals(name: str) -> tuple[str, ...]:
    return tuple(value for part in get_args(get_type_hints(Evaluate)[name]) for value in get_args(part))


def test_what_is_offered_without_torch_is_what_there_is() -> None:
    assert [name for name, one in METHODS.items() if not one.unsupervised] == list(NAMED)
    assert [name for name, one in METHODS.items() if one.unsupervised] == list(BLIND)
    assert literals("match") == MATCHES and literals("preset") == tuple(PRESETS) and literals("fit") == HOW
    assert get_args(get_type_hints(Evaluate)["sweep"]) == plan.SWEEPS and PROTOCOLS == plan.PROTOCOLS
    for one in PRESETS.values():
        assert one.methods in METHODS and one.protocol in PROTOCOLS and one.match in MATCHES
        parse_steps(one.refine)


def test_the_library_gives_what_the_command_writes(tiny_directory: Path, tmp_path: Path) -> None:
    asked = Evaluate(method="seg4diff,diffcut", refine=["none", "affinity"], layers="0-1", limit=2)
    here = asked.run(str(tiny_directory), progress=False)
    assert here.path is None
    line = ["--method", "seg4diff,diffcut", "--refine", "none,affinity", "--layers", "0-1", "--limit", "2", "-q"]
    assert command("evaluate", *line, "--model", str(tiny_directory), "-o", str(tmp_path / "run")) == 0
    there = read(tmp_path / "run")
    pd.testing.assert_frame_equal(here.table, there.table, check_dtype=False, check_categorical=False)
    pd.testing.assert_frame_equal(here.summary, there.summary)
    assert here.request == there.request
    saved = read(here.save(tmp_path / "saved"))
    assert (tmp_path / "saved" / "per_class.csv").read_text() == (tmp_path / "run" / "per_class.csv").read_text()
    assert saved.request == there.request


def test_a_full_cache_answers_for_its_own_dtype_and_weights_alone(tiny_directory: Path, tmp_path: Path) -> None:
    """Two pipelines at hand have one name, and no capture is missing that would have the model compared."""
    asked = Evaluate(method="seg4diff", layers="1", limit=1, cache=tmp_path / "cache")
    made = asked.run(Named(str(tiny_directory), {"dtype": "float32"}), progress=False)
    assert asked.run(str(tiny_directory), progress=False).table.equals(made.table)
    with pytest.raises(UserError, match="made in float32, not bfloat16"):
        asked.run(Named(str(tiny_directory), {"dtype": "bfloat16"}), progress=False)
    one, other = (MMDiT(tiny.pipeline("sd3", seed), "mine", tiny.T5_LENGTH) for seed in (0, 1))
    again = replace(asked, cache=tmp_path / "other")
    first = again.run(one, progress=False).table
    assert again.run(one, progress=False).table.equals(first)
    with pytest.raises(UserError, match="made with other weights of mine"):
        again.run(other, progress=False)


def test_a_run_is_found_again_however_its_options_were_written(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method's default stated and left out, and null for the word none, as records of before have it, are one
    measurement; another value is another."""
    monkeypatch.chdir(tmp_path)

    def folder(*options: str) -> Path | None:
        asked = Evaluate(method="conceptattention", layers="1", limit=1, options=options)
        return asked.run(str(tiny_directory), out="auto", resume=True, progress=False).path

    first = folder("conceptattention.normalise=none")
    assert first is not None
    record = json.loads((first / "run.json").read_text())
    assert record["request"]["options"] == {"conceptattention": {"normalise": "none"}}
    record["request"]["options"]["conceptattention"]["normalise"] = None
    (first / "run.json").write_text(json.dumps(record))
    assert folder("conceptattention.normalise=none", "conceptattention.softmax=auto") == first
    other = folder()
    assert other != first and folder("conceptattention.normalise=auto") == other


def test_a_preset_sets_the_protocol_of_a_paper_and_is_recorded(tiny_directory: Path) -> None:
    found = Evaluate(preset="seg4diff-unsup", limit=1, layers="0").run(str(tiny_directory), progress=False)
    request = found.request
    assert request["no_t5"] and request["max_sequence_length"] == 77
    assert (request["methods"], request["by_rows"], request["fit"]) == (["seg4diff-unsup"], True, "squash")
    assert set(found.summary["preset"]) == {"seg4diff-unsup"} and found.data["preset"] == "seg4diff-unsup"
    assert any("released matching" in note for note in found.data["remarks"])
    other = Evaluate(preset="seg4diff-unsup", match="image", sigma=0.3, limit=1, layers="0")
    request = other.run(str(tiny_directory), progress=False).request
    assert request["by_rows"] is False and request["sigmas"] == [0.3]


def windows(method: str, text: str) -> dict[str, Any]:
    return {"options": {method: {"side": tuple(map(int, text.split(",")))}}}


SETS = ("voc20", "voc21", "pc60", "coco-object", "coco-stuff-27", "ade20k", "cityscapes")
CLIPS = {"protocol": "full", "fit": "squash"}
DONE: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    # preset -> settings on every data set, and what is otherwise on some; sources: the papers and their official code
    "seg4diff": ({"method": "seg4diff", "protocol": "present", "sigma": "0.515", "fit": "squash", "text": True},
                 {"coco-object": {"dataset": "coco-object-words"}}),
    "seg4diff-unsup": ({"method": "seg4diff-unsup", "sigma": "0.515", "fit": "squash", "text": True, "match": "row",
                        "compared": "short:640", "options": {"seg4diff-unsup": {
                            "tau": 0.1, "axis": "token", "kinds": "all", "streams": "clip"}}}, {}),
    "diffseg": ({"method": "diffseg", "sigma": "0.454", "fit": "crop", "size": "512x512", "compared": "512x512",
                 "match": "upstream", "options": {"diffseg": {"tau": 0.9}}},
                {"coco-stuff-27": {"options": {"diffseg": {"tau": 1.1}}}}),
    "diffcut": ({"method": "diffcut", "sigma": "0.184", "fit": "crop", "size": "1024x1024", "compared": "128x128",
                 "match": "upstream", "many_to_one": True, "options": {"diffcut": {"tau": 0.5, "alpha": 10}}}, {}),
    "diffsegmenter": ({"method": "diffsegmenter-per-class", "protocol": "predicted", "sigma": "0.256", "fit": "squash",
                       "size": "512x512", "background": "threshold:0.5"}, {}),
    "iseg": ({"method": "iseg", "protocol": "predicted", "sigma": "0.256", "fit": "squash", "size": "512x512",
              "background": "power:2", "options": {"iseg": {"ent": 0.015, "rounds": 8}}},
             {"pc60": {"options": {"iseg": {"ent": 0.002, "rounds": 5}}},
              "coco-object": {"options": {"iseg": {"ent": 0.2, "rounds": 10}}, "background": "threshold:0.45"}}),
    **{name: (CLIPS | {"method": name, "refine": "vote" if name == "corrclip" else "none",
                       "background": "probability:0.2", **windows(name, "336,336,112")},
              {"pc60": {"background": "probability:0.15"}, "coco-object": {"background": "probability:0.25"},
               "ade20k": windows(name, "448,336,112"), "cityscapes": windows(name, "448,224,112")})
       for name in ("proxyclip", "corrclip")},
}  # fmt: skip
PLAIN = {"protocol": "present", "refine": "none", "match": "image", "background": "none", "many_to_one": False,
         "sigma": None, "fit": None, "size": None, "compared": None, "options": {}, "text": False}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("data", SETS)
def test_presets_set_what_each_paper_did_on_a_data_set(name: str, data: str) -> None:
    usual, there = DONE[name]
    tagged = {"tagger": "scenes-clip", "tag_threshold": 0.0} if usual.get("protocol") == "predicted" else {}
    one = Evaluate(preset=name, dataset=f"{data}:root", **tagged)  # type: ignore[arg-type]
    how = one.how
    assert {
        "method": ",".join(one.methods), "protocol": ",".join(one.protocols), "refine": ",".join(one.refinements),
        "match": one.matching, "background": how.background, "many_to_one": how.many_to_one, "sigma": how.sigma,
        "fit": how.fit, "size": how.size, "compared": one.scored_at, "options": one.values(), "text": how.paper_text,
        "dataset": one.source.removesuffix(":root"),
    } == PLAIN | {"dataset": data} | usual | there.get(data, {})  # fmt: skip


def test_options_that_are_given_win_over_a_preset() -> None:
    assert Evaluate(preset="diffcut", score_size="64x64").scored_at == "64x64"
    for name in ("proxyclip", "corrclip"):
        assert Evaluate(preset=name, options=[f"{name}.side=224"]).values() == {name: {"side": 224}}
        assert Evaluate(preset=name, method="seg4diff").values() == {}
    with pytest.raises(UserError, match="--score-size take another fit"):
        Evaluate(preset="diffcut", fit="letterbox")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": ","}, "--method names nothing"),
        ({"method": []}, "--method names nothing"),
        ({"protocol": ""}, "--protocol names nothing"),
        ({"refine": ()}, "--refine names nothing"),
        ({"background": ""}, "unknown background rule ''"),
        ({"score_size": ""}, "expected height x width"),
        ({"tags": "tags.json"}, "--tagger and --tags say which classes there are for --protocol predicted alone"),
        ({"tagger": "scenes-clip", "protocol": "full"}, "for --protocol predicted alone"),
        ({"many_to_one": True, "match": "majority"}, "--match majority leaves none"),
        ({"options": ["seg4diff.heads=1"], "heads": 0}, "--set seg4diff.heads and --heads"),
        ({"options": ["seg4diff.heads=1"], "sweep": "head"}, "all name heads; give one"),
    ],
)
def test_what_says_nothing_or_is_not_read_is_refused(options: dict[str, Any], words: str) -> None:
    """Not taken for the default, and not left unread."""
    with pytest.raises(UserError) as refused:
        Evaluate(**options)
    assert words in str(refused.value)


@pytest.mark.parametrize(("kind", "name"), [(Evaluate, "cache"), (Score, "export")])
def test_a_file_in_place_of_a_folder_is_told_by_its_option(kind: type[Experiment], name: str, tmp_path: Path) -> None:
    """With the advice to choose another --out, and when weights had been loaded."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--{name} '.*file' is a file; choose another folder with --{name}$"):
        kind(**{name: tmp_path / "file"}).gather(True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Segment(image="a.png", classes="cat", regions="r.png", refine="pamr"), "read by corrclip"),
        (lambda: Segment(image="a.png", classes="cat", heads=0, options=["heads=1"]), "--set heads and --heads"),
        (lambda: Discover(image="a.png", names_by="proxyclip"), "give them with --names"),
    ],
)  # fmt: skip
def test_what_is_not_read_of_one_picture_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
    assert Segment(image="a.png", classes="cat", regions="r.png", refine="vote").regions == Path("r.png")


def test_rows_tell_the_heads_that_a_method_reads() -> None:
    """Of a method without such an option all; of a sweep those that were asked for."""
    data, network = scenes("val", 1), (3, 2)

    def rows(**how: Any) -> list[tuple[str, tuple[int, ...], str]]:
        found = plan.Plan.of(data, ["seg4diff", "diffcut"], network, reading=Reading([0, 2]), **how)
        return [(entry.method.name, entry.layers, entry.heads) for entry in found.entries]

    assert rows(heads=(1,)) == [("seg4diff", (0, 2), "(1,)"), ("diffcut", (0, 2), "mean")]
    assert rows(options={"seg4diff": {"heads": 1}}) == [("seg4diff", (0, 2), "1"), ("diffcut", (0, 2), "mean")]
    alone = [("seg4diff", (0,), "1"), ("seg4diff", (2,), "0"), ("seg4diff", (2,), "1")]
    assert rows(sweep="head", heads={0: [1]}) == alone


def test_presets_are_what_is_asked_of_the_model(tiny_directory: Path, tmp_path: Path) -> None:
    """Not only set: iseg's and diffsegmenter's own noise level, size, background and options reach the request."""
    (tmp_path / "tags.json").write_text(json.dumps({scene_sample("val", 0).name: ["tree", "sky"]}))
    for name in ("iseg", "diffsegmenter"):
        asked = Evaluate(preset=name, limit=1, layers="0", size="32x32", tags=tmp_path / "tags.json")
        request = asked.run(str(tiny_directory), progress=False).request
        usual = DONE[name][0]
        assert request["sigmas"] == [0.256] and request["size"] == [32, 32] and request["fit"] == "squash"
        assert request["methods"] == [usual["method"]] and request["options"] == usual.get("options", {})
        assert request["background"] == "none"  # scenes have no background class


def test_a_preset_scores_at_the_papers_size(tiny_directory: Path) -> None:
    asked = Evaluate(preset="diffcut", dataset="scenes:val", limit=1, layers="0", size="32x32")
    found = asked.run(str(tiny_directory), progress=False)
    assert found.request["score_size"] == "128x128" and set(found.summary["score_size"]) == {"128x128"}
    table = found.table
    assert set(table.groupby(["method", "refine"], observed=True)["pixels"].sum()) == {128 * 128}


def test_presets_ask_for_what_they_need(pipe: Any) -> None:
    words = Evaluate(preset="seg4diff", dataset="coco-object:coco")
    assert words.source == "coco-object-words:coco" and Evaluate(dataset="coco-object:coco").source == words.dataset
    with pytest.raises(UserError, match="needs --tagger"):
        Evaluate(preset="iseg")
    with pytest.raises(UserError, match="reads text without T5: load the model with t5=False"):
        Evaluate(preset="seg4diff", limit=1).run(MMDiT(pipe), progress=False)


def test_layers_are_known_by_name_and_by_weights() -> None:
    medium = known_layers("stabilityai/stable-diffusion-3-medium-diffusers", "0")
    assert medium is not None and medium.layers == (9,)
    tuned = known_layers("models/stable-diffusion-3.5-medium+runs/magnet/lora", "0")
    flux = known_layers("black-forest-labs/FLUX.1-dev", "0")
    assert tuned is not None and tuned.layers == (9,) and flux is not None and flux.layers == (12, 17)
    chosen = json.loads(Path("analyses/results/segmentation_choice/selection.json").read_text(encoding="utf-8"))
    assert chosen["weight_hash"] == load("scenes-sd3").weight_hash  # chosen on the weights that ship
    own = known_layers("scenes-sd3", chosen["weight_hash"])
    assert own is not None and [list(own.layers), list(own.weights)] == [chosen["layers"], chosen["weights"]]
    assert known_layers("scenes-sd3", "0") is None and known_layers("stable-diffusion-3-medium-turbo", "0") is None


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3)).astype(np.uint8)).save(path)
    return path


def test_a_picture_is_labelled_in_memory_and_saved_as_the_command_does(
    picture: Path, pipe: Any, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Segment(image=picture, classes="red ring, cat", layers=[0, 2], refine="pamr:1")
    result = asked.run(str(tiny_directory), progress=False)
    assert result.path is None and not Path("runs").exists() and result.labels.shape == (48, 80)
    line = ["--classes", "red ring, cat", "--layers", "0,2", "--refine", "pamr:1", "--model", str(tiny_directory)]
    assert command("segment", str(picture), *line, "-o", "run", "-q") == 0
    result.save("saved")
    assert Path("saved/labels.png").read_bytes() == Path("run/labels.png").read_bytes()
    records = [json.loads(Path(name, "run.json").read_text(encoding="utf-8")) for name in ("saved", "run")]
    assert records[0]["request"] == records[1]["request"] and records[1]["status"] == "finished"
    assert "<img" in result._repr_html_() and "red ring" in result._repr_html_()
    array = Segment(image=np.array(Image.open(picture)), classes=["red ring", "cat"], layers="0,2", refine="pamr:1")
    assert np.array_equal(array.run(MMDiT(pipe), progress=False).labels, result.labels)
    assert Discover(image=picture, layers="0", tau=0.2).run(MMDiT(pipe), progress=False).names[0] == "segment 1"


def test_one_class_is_right_by_definition(picture: Path, pipe: Any) -> None:
    def said(**how: Any) -> str:
        return str(Segment(image=picture, layers="0", **how).run(MMDiT(pipe), progress=False).texts()[1:])

    assert "100 % by definition" in said(classes="cat")
    assert "definition" not in said(classes="cat", background="threshold:0.5") + said(classes="cat, ring")


def test_words_that_the_model_cannot_know_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("segment", "scenes:val:3", "--classes", "tree; kitten, wet grass", "-o", "run") == 0
    errors = capsys.readouterr().err
    assert errors.count("scenes-sd3 knows 43 words; not: kitten, wet (it knows ") == 1
    remarks = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["remarks"]
    assert sum("not: kitten, wet" in remark for remark in remarks) == 1
    chosen = json.loads((ROOT / "analyses/results/segmentation_choice/selection.json").read_text(encoding="utf-8"))
    known = ",".join(str(layer) for layer in sorted(chosen["layers"]))
    assert any(remark.startswith(f"layers {known}: its own selection") for remark in remarks)
    asked = ["--prompts", "a kitten on grass", "--layers", "0", "--num-steps", "1", "--guidance", "1", "-o", "budget"]
    assert command("attention-budget", *asked) == 0
    assert capsys.readouterr().err.count("not: kitten") == 1
    assert any(
        "not: kitten" in one for one in json.loads(Path("budget/run.json").read_text(encoding="utf-8"))["remarks"]
    )


def test_pictures_of_prompts_that_the_parser_cannot_read_are_drawn(tmp_path: Path) -> None:
    from mmdit_probe.experiments import Generate, Score

    prompts = ["a red ring on grass", "Two red rings, please!"]
    made = Generate(prompts=prompts, num_steps=1, guidance=1).run("scenes-sd3", progress=False)
    table = made.table.set_index("prompt")
    assert table["facts"].isna().tolist() == [False, True] and table["clip_t"].notna().all()
    rows = made.summary.set_index("outcome")
    assert (rows.loc["facts", "n"], rows.loc["clip_t", "n"], len(made.store.picture_names())) == (1, 2, 2)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    scored = Score(prompts=str(tmp_path / "prompts.txt"), num_steps=1, guidance=1).run("scenes-sd3", progress=False)
    assert scored.table.set_index("prompt")["facts"].isna().tolist() == [False, True]
    assert scored.table["clipscore[scenes-clip]"].notna().all()


def test_scenes_are_pictures_too(pipe: Any) -> None:
    result = Segment(image=scene_sample("val", 3), classes="tree, sky", layers="0").run(MMDiT(pipe), progress=False)
    assert result.request["image"] == "scenes:val:3" and set(result.areas) == {"tree", "sky"}


def test_a_narrow_terminal_shows_what_a_sweep_compares() -> None:
    from rich.console import Console

    from mmdit_probe.cli.tables import fitted
    from mmdit_probe.experiments.evaluate import league_table

    numbers = ["miou", "miou_low", "miou_high", "miou_gt", "accuracy", "macc", "gain", "gain_low", "gain_high", "over",
               "over_low", "over_high", "segments"]  # fmt: skip
    places = {"protocol": "present", "refine": "none", "heads": "all", "sigma": "0.515", "n": 40} | dict.fromkeys(
        numbers, 0.5
    )
    rows = [{"method": "seg4diff", "layers": layer, "control": "random"} for layer in ("3", "4")]
    bound = {"method": "one true token per class", "layers": "", "heads": "", "sigma": "", "control": ""}
    table = league_table(pd.DataFrame([places | row for row in [*rows, bound]]))
    for width in (80, 50):
        shown, remark = fitted(table, Console(width=width))
        assert [str(one.header) for one in shown.columns][:3] == ["protocol", "method", "layers"]
        assert "heads, sigma" in remark and "layers" not in remark and "mIoU" in [str(c.header) for c in shown.columns]
