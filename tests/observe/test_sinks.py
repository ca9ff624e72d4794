"""Single-key masses against the explicit softmax, outlier channels on a planted one, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmdit_probe import probe
from mmdit_probe.cli.app import main
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.observe.sinks import SINK, Channels, KeyMass, SinkFree, top_keys, without_sinks
from tests import tiny
from tests.observe.oracle import attentions
from tests.observe.test_families import IMAGE as IMAGE_KEY, TEXT as TEXT_KEY, case_of, joint_paths, run, samples

IMAGE = 16
N = IMAGE + tiny.CLIP_LENGTH + tiny.T5_LENGTH


def sample(pipe: Any) -> None:
    pipe("a red ring", num_inference_steps=1, guidance_scale=1.0, output_type="latent", max_sequence_length=10,
         generator=torch.Generator().manual_seed(0))  # fmt: skip


def test_every_key_is_the_column_mean_of_the_softmax(pipe: Any) -> None:
    dense = attentions(lambda: sample(pipe), N)
    with probe(pipe, KeyMass()) as run:
        sample(pipe)
    table = run[KeyMass].table()
    assert len(table) == tiny.LAYERS * tiny.HEADS * 2 * N
    for layer in range(tiny.LAYERS):
        for query, rows in (("image", slice(0, IMAGE)), ("text", slice(IMAGE, N))):
            part = table[(table["layer"] == layer) & (table["query"] == query)].sort_values(["head", "position"])
            expected = dense[layer][0][:, rows].mean(1)
            assert torch.allclose(
                torch.tensor(part["mass"].to_numpy(float)).reshape(tiny.HEADS, N), expected, atol=1e-6
            )
    words = table[
        (table["layer"] == 0) & (table["head"] == 0) & (table["query"] == "image") & (table["span"] == "word")
    ]
    assert set(words["word"]) == {"a", "red", "ring"}
    assert table[table["token"] == "image"]["place"].max() == IMAGE - 1


def test_a_planted_channel_is_found(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn.to_v.weight[5] *= 100
    with probe(pipe, Channels()) as run:
        sample(pipe)
    table = run[Channels].table().set_index(["layer", "kind", "token"])
    assert table.loc[(1, "value", "image"), "channel"] == 5
    assert table.loc[(1, "value", "image"), "ratio"] > 30
    assert table.loc[(0, "value", "image"), "ratio"] < 10


def test_top_keys_name_the_sink() -> None:
    rows = []
    for head, bos in ((0, 0.7), (1, 0.01)):
        masses = [bos] + [(1 - bos) / 99] * 99
        for position, mass in enumerate(masses):
            text = position < 10
            rows.append(
                {"prompt": "p", "seed": 0, "step": 0, "branch": "cond", "layer": 0, "head": head, "query": "image",
                 "position": position, "token": "text" if text else "image",
                 "span": "bos" if position == 0 else "word" if text else "all", "stream": "clip" if text else "",
                 "mass": mass, "uniform": 0.01}
            )  # fmt: skip
    top = top_keys(pd.DataFrame(rows)).set_index("head")
    assert top.loc[0, "kind"] == "bos clip"
    assert (top.loc[0, "sinks"], top.loc[0, "sink_mass"]) == (1, 0.7)
    assert (top.loc[1, "sinks"], top.loc[1, "sink_mass"]) == (0, 0)


def test_removing_sinks_keeps_the_winner() -> None:
    maps = torch.rand(4, 4, 6)
    clean = without_sinks(maps, [1, 3, 4])
    assert torch.allclose(clean.sum(-1), torch.ones(4, 4))
    assert torch.equal(clean.argmax(-1), maps[..., [1, 3, 4]].argmax(-1))


def test_maps_without_sinks_are_the_softmax_without_those_keys(pipe: Any) -> None:
    with torch.no_grad():  # one text token that every image query attends to
        for block in pipe.transformer.transformer_blocks:
            block.attn.to_q.bias += 6.0
            block.attn.add_k_proj.weight *= 3.0
    dense = attentions(lambda: sample(pipe), N)
    with probe(pipe, SinkFree()) as run:
        sample(pipe)
    removed, words = 0, [IMAGE + p for p in MMDiT(pipe).token_tables(["a red ring"])[0].positions(kind="word")]
    for layer in range(tiny.LAYERS):
        seen = dense[layer][0][:, :IMAGE].float()  # [H, I, N]
        sinks = seen.mean(1) > SINK / N  # [H, N]
        sinks[:, words] = False
        removed += int(sinks.sum())
        left = seen.masked_fill(sinks[:, None], 0.0)
        expected = (left / left.sum(-1, keepdim=True))[..., IMAGE:]
        plain, clean = (maps[0].flatten(1, 2) for maps in run[SinkFree].maps(layer))
        assert torch.allclose(plain, seen[..., IMAGE:], atol=1e-4)
        assert torch.allclose(clean, expected, atol=1e-4)
        share = (seen * sinks[:, None]).sum(-1).mean(-1)
        assert torch.allclose(run[SinkFree].removed(layer)[0], share, atol=1e-5)
    assert removed > 0  # else nothing was tested


def test_scores_of_planted_maps() -> None:
    """A bright sink in one head hides the words in the mean over heads; without it they are found."""
    from mmdit_probe import load
    from mmdit_probe.experiments.scenes_quality import CLEAN, MEAN, PLAIN, improvement, map_scores
    from mmdit_probe.observe.pca import token_classes
    from mmdit_probe.scenes import scene
    from mmdit_probe.scenes.world import CLASSES

    model, frames = load("scenes-sd3"), []
    for index in range(8):
        item = scene("val", index)
        (tokens,) = model.token_tables([" ".join(item.class_names)])
        labels = torch.from_numpy(token_classes(item.classes[None], (16, 16))[0])
        truth = torch.full((16, 16, len(tokens)), 0.01)
        for name in item.class_names:
            for places in tokens.word_spans(name).values():
                truth[..., places] += (labels == CLASSES.index(name)).float()[..., None] * 0.05
        rows = torch.arange(16.0)[:, None, None] / 16
        plain, seen = torch.stack([truth * (0.02 + 0.9 * (1 - rows)), truth]), SinkFree()
        seen._kept[0] = (plain[None], torch.stack([truth, truth])[None], torch.zeros(1, 2))
        frames.append(map_scores(seen, item.classes, CLASSES, tokens, [0]).assign(item=index))
    table = pd.concat(frames)
    heads = table[(table["head"] == 0)].set_index(["item", "maps"])
    assert (heads.xs(CLEAN, level="maps")["auc"] > heads.xs(PLAIN, level="maps")["auc"]).all()
    assert heads.xs(CLEAN, level="maps")["auc"].min() == 1.0
    gain = improvement(table).set_index(["head", "score"])
    assert gain.loc[(0, "auc"), "verdict"] == "better" and gain.loc[(1, "auc"), "verdict"] == "no difference shown"
    assert gain.loc[(MEAN, "miou"), "after"] > 0.8


def test_a_class_within_a_longer_ones_name_has_its_own_words_alone() -> None:
    """Of "ring" and "red ring" in one prompt, the ring's map was that of both."""
    from mmdit_probe import load
    from mmdit_probe.experiments.scenes_quality import map_scores

    (tokens,) = load("scenes-sd3").token_tables(["ring red ring"])
    label = np.arange(16)[None].repeat(16, 0) // 8  # the left half is a ring, the right half a red one
    own = torch.zeros(16, 16, len(tokens))
    for place, token in enumerate(tokens.tokens):
        if token.word_index >= 0:
            own[..., place] = torch.from_numpy(label == (token.word_index > 0)).float()
    seen = SinkFree()
    seen._kept[0] = (own[None, None], own[None, None], torch.zeros(1, 1))
    assert (map_scores(seen, label, ["ring", "red ring"], tokens, [0])["auc"] == 1).all()


def test_command(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["diagnose", "--model", str(tiny_directory), "--images", "scenes:val", "--limit", "2"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--prompts", "a red ring", "--layers", "0,2", "--out", "run", "--json"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    document = json.loads(out)
    assert {row["layer"] for row in document["sinks"]} == {0, 2}
    names = {path.name for path in Path("run").iterdir()}
    assert {"keys.parquet", "channels.parquet", "diagnose.png", "diagnose_maps.png", "sinks.csv"} <= names
    outliers = pd.read_csv("run/outlier_channels.csv")
    assert (outliers["ratio_low"] <= outliers["ratio"]).all() and set(outliers["n"]) == {2}


def test_command_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Map quality before and after, sinks beside those of uniform attention, and a resumed run."""
    monkeypatch.chdir(tmp_path)
    arguments = ["diagnose", "--limit", "3", "--layers", "4", "--control", "uniform", "--out", "run", "--json"]
    for extra in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *extra])
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
    document = json.loads(out)
    heads = {row["head"] for row in document["map_quality"]}
    assert heads == {-1, 0, 1, 2, 3}
    assert all(0 <= row["before"] <= 1 and row["low"] <= row["difference"] <= row["high"]
               for row in document["map_quality"])  # fmt: skip
    assert {row["layer"] for row in document["controls"]} == {4}
    assert all(row["control_value"] == 0 for row in document["controls"])  # uniform attention has no sinks


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video"])
def test_channels_are_of_the_tokens_that_a_sample_has(name: str) -> None:
    """What a mask hides is no token: not among keys and values, nor among queries and outputs."""
    case = case_of(name)
    with probe(case.model, Channels()) as watched:
        run(case.model, case.inputs)
    table = watched[Channels].table().set_index(["layer", "kind", "token"])
    hidden = 0
    for layer, path in enumerate(joint_paths(case)):
        for token, kind in (("image", IMAGE_KEY), ("text", TEXT_KEY)):
            for what in ("query", "key", "value"):
                rows = []
                for call, row, kinds in samples(case, path):
                    rows.append(getattr(call, what)[row].double()[:, kinds == kind].transpose(0, 1).flatten(1))
                    hidden += int((kinds == -1).sum())
                size = torch.cat(rows).square().mean(0).sqrt()
                ratio = float(size.max() / size.median())
                assert table.loc[(layer, what, token), "ratio"] == pytest.approx(ratio, rel=1e-4)
                assert table.loc[(layer, what, token), "channel"] == int(size.argmax())
    assert hidden > 0
