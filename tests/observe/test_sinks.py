"""Single-key masses against the explicit softmax, outlier channels on a planted one, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mmdit_probe import probe
from mmdit_probe.cli.app import main
from mmdit_probe.observe.sinks import Channels, KeyMass, top_keys, without_sinks
from tests import tiny
from tests.observe.oracle import attentions

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
            assert torch.allclose(torch.tensor(part["mass"].to_numpy()).reshape(tiny.HEADS, N), expected, atol=1e-6)
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
