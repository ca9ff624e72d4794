"""The evaluation end to end on tiny pictures: resuming, caching, sweeps, protocols, baselines, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mmdit_probe.cli.app import main
from mmdit_probe.data import Dataset, Fit, Sample, dataset
from mmdit_probe.data.class_names import SegClass, class_list
from mmdit_probe.errors import UserError
from mmdit_probe.evaluate.captures import Captures
from mmdit_probe.evaluate.league import league
from mmdit_probe.evaluate.plan import COLUMNS, Plan, Scoring, _shares
from mmdit_probe.evaluate.scores import matched_by_rows
from mmdit_probe.experiments import Evaluate
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.results import read_table
from mmdit_probe.results.processes import alone_under_launcher
from mmdit_probe.segment.capture import Request, capture
from mmdit_probe.segment.record import Capture, Reading

NAMES = ("red", "ring", "cat", "background")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A generic data set of five pictures."""
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("red\nring; round\ncat\nbackground\n")
    rng = np.random.default_rng(0)
    for index in range(5):
        height, width = 40 + 8 * index, 56
        labels = np.zeros((height, width), np.uint8)
        labels[:, width // 2 :] = 1 + index % 3
        labels[:4] = 255
        pixels = np.array([[200, 20, 20], [20, 20, 200], [20, 200, 20], [90, 90, 90]])[labels % 4]
        Image.fromarray(np.clip(pixels + rng.integers(0, 30, pixels.shape), 0, 255).astype(np.uint8)).save(
            folder / "images" / f"p{index}.png"
        )
        Image.fromarray(labels).save(folder / "labels" / f"p{index}.png")
    return folder


@pytest.fixture
def captures(pipe: Any) -> Captures:
    return Captures(lambda: MMDiT(pipe), "tiny")


def plan_of(
    dataset: Any, captures: Captures, methods: list[str], read: dict[str, Any] | None = None, **how: Any
) -> Plan:
    facts, reading = captures.facts, Reading(layers="all", **(read or {}))
    of_scoring = [field.name for field in fields(Scoring) if field.name in how]
    scoring = Scoring(**{name: how.pop(name) for name in of_scoring})
    return Plan.of(dataset, methods, (facts["layers"], facts["heads"]), reading=reading, scoring=scoring, **how)


def frame(plan: Plan, captures: Captures) -> pd.DataFrame:
    return pd.concat(map(pd.DataFrame, plan.rows(captures, range(len(plan.dataset.samples)))))


@pytest.mark.parametrize(
    ("method", "rule", "told"),
    [("seg4diff", "none", True), ("seg4diff", "threshold:0.5", False), ("diffcut", "none", False)],
)
def test_a_background_that_no_rule_predicts_is_told(
    root: Path, captures: Captures, method: str, rule: str, told: bool
) -> None:
    ask = Evaluate(dataset=f"folder:{root}", method=method, background=rule)
    data, tags = ask.gather(False)
    assert data.background == 3
    notes = ask.prepare(captures, (data, tags)).notes
    assert any("which --background none does not predict" in note for note in notes) is told


def test_every_pixel_is_counted_once_per_configuration(root: Path, captures: Captures) -> None:
    data = dataset(f"folder:{root}")
    assert data.background == 3 and [one.name for one in data.classes] == list(NAMES)
    plan = plan_of(
        data, captures, ["seg4diff", "diffsegmenter", "seg4diff-unsup", "diffcut"],
        protocols=["present", "full"], refine=["none", "affinity:1+pamr:2"], background="threshold:0.5",
    )  # fmt: skip
    counts = frame(plan, captures)
    assert list(counts.columns) == list(COLUMNS)
    want = sum((np.array(sample.label()) != 255).sum() for sample in data.samples)
    sums = counts.groupby(["protocol", "method", "refine"])["pixels"].sum()
    assert set(sums) == {want}
    # per protocol: 4 runs, as many with words shifted, 2 controls x 2 refinements, the ceiling; unsupervised unshifted
    assert len(sums) == 2 * (4 + 4 + 4 + 1) + 4 + 4 + 1
    table = league(counts, 4)
    assert {"one class everywhere", "one segment", "token-grid ceiling", "random"} <= set(table["method"])
    ceiling = table[table["method"] == "token-grid ceiling"]["miou"].min()
    assert 0.7 < ceiling <= 1.0 and (table["miou"] <= ceiling + 1e-9).all()
    assert table[(table["refine"] != "none") & (table["role"] == "method")]["gain"].notna().all()


def test_protocols_see_their_own_vocabulary(root: Path, captures: Captures) -> None:
    data = dataset(f"folder:{root}")
    tags = {sample.name: ["cat", "ring"] for sample in data.samples}
    plan = plan_of(data, captures, ["seg4diff"], protocols=["present", "predicted", "full"], tags=tags)
    truth = np.array(data.samples[0].label())
    assert plan.vocabulary("present", "p0", truth) == [0, 1]
    assert plan.vocabulary("predicted", "p0", truth) == [1, 2]
    assert plan.vocabulary("full", "p0", truth) == [0, 1, 2]  # the background is left to the rule
    by_word = plan_of(data, captures, ["seg4diff"], protocols=["full"], background="class:background")
    assert by_word.vocabulary("full", "p0", truth) == [0, 1, 2, 3]
    found = frame(plan, captures)
    predicted = found[(found["protocol"] == "predicted") & (found["method"] == "seg4diff")]
    assert set(predicted["found"]) <= {1, 2}
    with pytest.raises(UserError, match="nothing of image"):
        plan_of(data, captures, ["seg4diff"], protocols=["predicted"], tags={}).vocabulary("predicted", "p0", truth)
    with pytest.raises(UserError, match="--tags"):
        plan_of(data, captures, ["seg4diff"], protocols=["predicted"])


def test_an_ignored_class_stands_in_prompts_and_is_not_scored(root: Path, captures: Captures) -> None:
    """COCO-Object of the paper's Table 1: "background" competes as a word, its pixels are not counted."""
    plain = dataset(f"folder:{root}", 2)
    data = replace(plain, background=None, ignore=(0,))
    plan = plan_of(data, captures, ["seg4diff", "seg4diff-unsup"], protocols=["present"])
    truths = [np.array(sample.label()) for sample in data]
    assert plan.vocabulary("present", "p0", truths[0]) == [0, 1]
    counts = frame(plan, captures)
    assert set(counts["truth"]) == {1, 2}
    scored = counts[counts["method"] == "seg4diff"]
    assert scored["pixels"].sum() == sum(np.isin(truth, (1, 2)).sum() for truth in truths)
    assert 0 in set(scored["found"])  # what the word "red" wins of the others counts against them


def test_the_best_word_map_of_coco_object_scores_one(tmp_path: Path, captures: Captures, monkeypatch: Any) -> None:
    """One cat in a quarter of the picture, its word's map right, that of "background" flat. As Table 1 has it, label 0
    competes and is not scored: 1. With background scored and not named, the cat takes all: (1/4 + 0) / 2."""
    cat = [one.name for one in class_list("coco-object")].index("cat") + 1
    label = np.zeros((64, 64), np.uint8)
    label[:32, 32:] = cat
    for folder, name in (("val2017", "a.jpg"), ("annotations_object/val2017", "a.png")):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(label).save(tmp_path / folder / name)
    original = captures.get

    def best(requests: Any) -> list[Capture]:
        found = original(requests)
        for one in found:
            h, w = one.grid
            inside = torch.zeros(h, w)
            inside[: h // 2, w // 2 :] = 1.0
            for part in one.passes:
                for record in part.records.values():
                    record.i2t = torch.zeros_like(record.part("i2t"))
                    for query in part.prompt.queries:
                        flat = query.text == "red"  # below the least of the cat's map after it was enlarged, .28
                        record.i2t[..., query.positions()] = 0.25 if flat else inside.reshape(1, -1, 1)
        return found

    monkeypatch.setattr(captures, "get", best)

    def miou(name: str) -> float:
        data = dataset(f"{name}:{tmp_path}")
        data = replace(data, classes=[SegClass(("red",)), *data.classes[1:]])  # "background" is too long for this model
        plan = plan_of(data, captures, ["seg4diff"], options={"seg4diff": {"softmax": "joint"}})
        table = league(frame(plan, captures), len(data.classes)).set_index("method")
        return float(table.loc["seg4diff", "miou"])

    asked = Evaluate(preset="seg4diff", dataset="coco-object:x").source.partition(":")[0]
    assert miou(asked) == 1.0 and miou("coco-object") == 0.125


def test_the_vote_counts_what_the_background_rule_made_of_the_maps(root: Path, captures: Captures) -> None:
    """Every probability is below 1, so all is background; a region's share of votes for a class would be 1."""
    data = replace(dataset(f"folder:{root}", 2), background=3)
    plan = plan_of(data, captures, ["seg4diff"], refine=["none", "vote"], background="probability:1")
    table = frame(plan, captures)
    for refine in ("none", "vote"):
        for method in ("seg4diff", "seg4diff, words shifted", "random"):
            found = table[(table["refine"] == refine) & (table["method"] == method)]
            assert set(found["found"]) == {3}, (refine, method)


def test_maps_before_the_softmax_from_the_command_line(
    root: Path, tiny_directory: Path, tmp_path: Path, pipe: Any
) -> None:
    """`--set seg4diff.softmax=logit`: the argmax of q k / sqrt(D), mean over heads, layers and a class's tokens."""
    line = ["evaluate", "--dataset", f"folder:{root}", "--layers", "all", "--limit", "2", "-q", "--model"]
    for name, more in (("before", ["--set", "seg4diff.softmax=logit"]), ("after", [])):
        with pytest.raises(SystemExit) as stop:
            main([*line, str(tiny_directory), "--out", str(tmp_path / name), *more])
        assert stop.value.code == 0
    tables = {name: read_table(tmp_path / name / "counts.parquet") for name in ("before", "after")}
    found = {name: table[table["method"] == "seg4diff"] for name, table in tables.items()}
    assert json.loads((tmp_path / "before/run.json").read_text())["request"]["options"] == {
        "seg4diff": {"softmax": "logit"}
    }
    data, model, keys = dataset(f"folder:{root}", 2), MMDiT(pipe), ["image", "truth", "found"]
    want: dict[tuple[int, int, int], int] = {}
    for index, sample in enumerate(data.samples):
        truth = np.array(sample.label())
        ids = [i for i in np.unique(truth) if i not in (255, data.background)]
        one = capture(model, sample.image, [data.classes[i] for i in ids], Reading(layers="all"), keep=("i2t_logit",))
        queries = one.passes[0].prompt.queries
        logits = torch.stack(
            [one.passes[0].records[layer].part("i2t_logit").double().mean(0) for layer in range(3)]
        ).mean(0)
        by_class = [
            torch.stack([logits[:, query.positions()].mean(1) for query in queries if query.of_class == k]).amax(0)
            for k in range(len(ids))
        ]
        maps = torch.stack(by_class).reshape(1, len(ids), *one.grid)
        large = torch.nn.functional.interpolate(maps, truth.shape, mode="bilinear")[0].argmax(0).numpy()
        for pair in zip(truth[truth != 255], np.array(ids)[large[truth != 255]], strict=True):
            want[index, int(pair[0]), int(pair[1])] = want.get((index, int(pair[0]), int(pair[1])), 0) + 1
    pixels = found["before"].groupby(keys)["pixels"].sum()
    off = pixels.sub(pd.Series(want).rename_axis(keys), fill_value=0).abs().sum() / 2
    assert len(queries) > 1 and off <= 2  # float32 beside float64
    assert not pixels.equals(found["after"].groupby(keys)["pixels"].sum())


def test_sweeps_take_one_thing_at_a_time(root: Path, captures: Captures) -> None:
    data = dataset(f"folder:{root}", 1)
    one = {sweep: frame(plan_of(data, captures, ["seg4diff"], {"sigmas": (0.3, 0.6)}, sweep=sweep), captures)
           for sweep in ("layer", "head", "sigma")}  # fmt: skip
    runs = {sweep: found[found["method"] == "seg4diff"] for sweep, found in one.items()}
    assert set(runs["layer"]["layers"]) == {"0", "1", "2"}
    assert set(zip(runs["head"]["layers"], runs["head"]["heads"], strict=True)) == {
        (str(layer), str(head)) for layer in range(3) for head in range(2)
    }
    assert set(runs["sigma"]["sigma"]) == {"0.3", "0.6"}
    alone = frame(plan_of(data, captures, ["seg4diff"], {"sigmas": (0.3,)}), captures)
    same = runs["sigma"][runs["sigma"]["sigma"] == "0.3"]
    assert alone[alone["method"] == "seg4diff"]["pixels"].tolist() == same["pixels"].tolist()


def test_cache_answers_without_the_model(root: Path, pipe: Any, tmp_path: Path) -> None:
    data = dataset(f"folder:{root}", 2)
    first = Captures(lambda: MMDiT(pipe), "tiny", tmp_path / "cache")
    methods = ["seg4diff", "conceptattention", "tokenrank", "diffseg"]
    want = frame(plan_of(data, first, methods), first)

    def no_model() -> MMDiT:
        raise AssertionError("the model was loaded")

    again = Captures(no_model, "tiny", tmp_path / "cache")
    pd.testing.assert_frame_equal(frame(plan_of(data, again, methods), again), want)
    with pytest.raises(UserError, match="was made with tiny"):
        Captures(no_model, "other", tmp_path / "cache")
    with pytest.raises(AssertionError, match="was loaded"):
        frame(plan_of(data, again, methods, {"seeds": (5,)}), again)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    with pytest.raises(UserError, match="was made with other weights of text_encoder of tiny; choose another folder"):
        _ = Captures(lambda: MMDiT(pipe), "tiny", tmp_path / "cache").model


def test_a_cache_holds_half_precision_within_its_stated_error(root: Path, pipe: Any, tmp_path: Path) -> None:
    data = dataset(f"folder:{root}", 1)
    exact, kept = Captures(lambda: MMDiT(pipe), "tiny"), Captures(lambda: MMDiT(pipe), "tiny", tmp_path / "cache")
    parts = ["feat_proj", "i2i", "i2t", "i2t_logit"]
    one, other = (
        captures.get([("p0", Request(data[0].image, data.classes[:2], Reading(layers="all"), parts))])[0]
        for captures in (exact, kept)
    )
    for layer, record in one.passes[0].records.items():
        for part in parts:
            want, found = record.part(part), other.passes[0].records[layer].part(part)
            assert found.dtype == want.dtype and ((found - want).abs() <= 5e-4 * want.abs() + 3e-8).all()
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    values = sum(record.part(part).numel() for record in one.passes[0].records.values() for part in parts)
    assert stored < 2 * values + 20_000


@pytest.mark.parametrize(
    ("index", "said"),
    [("{bro", "cannot be read as JSON"), ("[]", "is no index"), ('{"version": 2}', "is no index"),
     ('{"version": 2, "model": {}}', "is no index"), ('{"model": {}}', "another version")],
)  # fmt: skip
def test_a_damaged_cache_is_refused_in_a_sentence(index: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(UserError, match=said):
        Captures(lambda: pytest.fail("the model was loaded"), "tiny", tmp_path)


def test_pictures_and_labels_of_different_size_are_named(root: Path, captures: Captures) -> None:
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "labels" / "p0.png")
    with pytest.raises(UserError, match=r"p0: the picture has 40 x 56 pixels, its label 5 x 5"):
        frame(plan_of(dataset(f"folder:{root}"), captures, ["seg4diff"]), captures)
    Image.fromarray(np.full((40, 56), 9, np.uint8)).save(root / "labels" / "p0.png")
    with pytest.raises(UserError, match=r"holds ids \[9\]"):
        frame(plan_of(dataset(f"folder:{root}"), captures, ["seg4diff"]), captures)


@pytest.mark.parametrize("rows", [1, 3])
def test_counts_do_not_depend_on_the_rows_of_a_forward(root: Path, pipe: Any, captures: Captures, rows: int) -> None:
    """Of other prompts, sizes and passes; at least 99.9 % of labels are the same, as sums of floats differ."""
    data, methods = dataset(f"folder:{root}"), ["seg4diff", "iseg", "conceptattention", "seg4diff-unsup"]
    how = {"protocols": ["present", "full"], "sweep": "layer"}
    at_once = frame(plan_of(data, captures, methods, {"fit": "aspect"}, **how), captures)
    other = Captures(lambda: MMDiT(pipe), "tiny", rows=rows)
    one = frame(plan_of(data, other, methods, {"fit": "aspect"}, **how), other)
    keys = [name for name in COLUMNS if name != "pixels"]
    both = one.groupby(keys)["pixels"].sum().sub(at_once.groupby(keys)["pixels"].sum(), fill_value=0)
    assert both.abs().sum() / 2 <= 1e-3 * one["pixels"].sum()


def arguments(root: Path, model: Path, out: Path) -> list[str]:
    return ["evaluate", "--dataset", f"folder:{root}", "--method", "seg4diff,diffcut", "--layers", "all",
            "--model", str(model), "--out", str(out), "--json"]  # fmt: skip


def test_command_resumes_without_recounting(
    root: Path, tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(root, tiny_directory, tmp_path / "whole"))
    document = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and document["league"]
    for name in ("counts.parquet", "league.csv", "per_class.csv", "league.png", "run.json"):
        assert (tmp_path / "whole" / name).exists()

    original, seen = Plan._counted, []

    def failing(self: Plan, captures: Captures, image: Any, found: Any) -> Any:
        seen.append(image.index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, captures, image, found)

    monkeypatch.setattr(Plan, "_counted", failing)
    with pytest.raises(SystemExit):
        main(arguments(root, tiny_directory, tmp_path / "cut"))
    with pytest.raises(SystemExit) as stop:
        main([*arguments(root, tiny_directory, tmp_path / "cut"), "--resume", "--batch", "2"])
    assert stop.value.code == 0 and seen == [0, 1, 2, 2, 3, 4]
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "cut" / "counts.parquet"), read_table(tmp_path / "whole" / "counts.parquet")
    )


def test_masks_without_names_are_scored_per_mask(tmp_path: Path, captures: Captures) -> None:
    rng = np.random.default_rng(1)
    for name, cut in (("sa_1", 20), ("sa_2", 40)):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3)).astype(np.uint8)).save(tmp_path / f"{name}.png")
        runs = [{"size": [48, 64], "counts": [0, 48 * cut, 48 * (64 - cut)]},
                {"size": [48, 64], "counts": [48 * cut, 48 * (64 - cut)]}]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"annotations": [{"segmentation": one} for one in runs]}))
    data = dataset(f"sa1b:{tmp_path}")
    counts = frame(plan_of(data, captures, ["diffcut"]), captures)
    table = league(counts, len(data.classes), agnostic=True).set_index("method")
    # one segment everywhere takes the larger mask: 44/64 and 40/64 of the picture, nothing of the other
    assert table.loc["one segment", "miou"] == pytest.approx(np.mean([44 / 64, 0, 40 / 64, 0]))
    assert table.loc["token-grid ceiling", "miou"] > 0.9 and table.loc["diffcut", "segments"] >= 1
    assert table["miou"].equals(table["miou_gt"])
    with pytest.raises(UserError, match="masks without names; score it with seg4diff-unsup"):
        plan_of(data, captures, ["seg4diff"])


def test_matching_by_rows_is_counted_as_it_is_defined(root: Path, captures: Captures) -> None:
    data = dataset(f"folder:{root}", 2)
    plan = plan_of(data, captures, ["diffcut"], by_rows=True)
    table = league(frame(plan, captures), 4, match="row").set_index("method")
    truths = [np.array(sample.label()) for sample in data.samples]
    want = sum(matched_by_rows(truth, np.zeros_like(truth), 4) for truth in truths)
    assert table.loc["one segment", "accuracy"] == pytest.approx(np.diag(want).sum() / want.sum())
    whole = league(frame(plan_of(data, captures, ["diffcut"]), captures), 4).set_index("method")
    for name in ("one segment", "diffcut"):
        assert table.loc[name, "accuracy"] >= whole.loc[name, "accuracy"]


def test_one_process_under_accelerate_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert not alone_under_launcher()
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert alone_under_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not alone_under_launcher()


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(root: Path, tiny_directory: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }  # fmt: skip
    one = [sys.executable, "-m", "mmdit_probe", *arguments(root, tiny_directory, tmp_path / "one")]
    subprocess.run(one, env=environment, check=True, capture_output=True, timeout=900)
    two = [sys.executable, "-m", "mmdit_probe", *arguments(root, tiny_directory, tmp_path / "two")]
    ranks = [
        subprocess.Popen(two, env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(printed[0])["league"] and not printed[1].strip()
    tables = [read_table(tmp_path / name / "counts.parquet") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


def test_classes_of_the_part_that_a_crop_cuts_off_are_not_present(captures: Captures) -> None:
    """Of 32 x 64 pixels the middle square is read: class 2, on the left edge, is neither asked for nor counted."""
    truth = np.ones((32, 64), np.int64)
    truth[:, 32:], truth[:, :10] = 0, 2
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    data = Dataset("one", [SegClass((name,)) for name in NAMES[:3]], [Sample("a", image, label=lambda: truth)])
    for how, classes in (("crop", {0, 1}), ("squash", {0, 1, 2})):
        rows = frame(plan_of(data, captures, ["seg4diff"], {"fit": how}, protocols=("present",)), captures)
        drawn = rows[rows["method"] == "random"]  # maps of chance win somewhere, whichever class they are of
        assert set(drawn["truth"]) == set(drawn["found"]) == classes


@pytest.mark.parametrize("how", ["squash", "letterbox", "crop", "aspect"])
@pytest.mark.parametrize("size", [(64, 64), (75, 100), (140, 60)])
def test_shares_of_tokens_are_those_of_torchs_pooling(how: str, size: tuple[int, int]) -> None:
    truth, ids = np.random.default_rng(0).integers(0, 4, size), [0, 1, 3]
    fit = Fit.of(size, (96, 96), 16, how)
    grid = (fit.size[0] // 16, fit.size[1] // 16)
    top, left, bottom, right = (round(edge) for edge in fit.source)
    up, across, down, over = fit.target
    canvas = torch.zeros(3, *fit.size)
    masks = torch.from_numpy(np.stack([truth[top:bottom, left:right] == i for i in ids])).float()
    canvas[:, up:down, across:over] = torch.nn.functional.adaptive_avg_pool2d(masks, (down - up, over - across))
    want = torch.nn.functional.adaptive_avg_pool2d(canvas, grid)
    assert torch.allclose(_shares(truth, ids, Capture(None, fit, grid, [], [], (), ())), want, atol=1e-5)
