"""Perturbed guidance in the stock pipeline against a loop written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmdit_probe import AttentionMass, load, probe
from mmdit_probe.edit import Blur, Scale, perturbed_guidance
from mmdit_probe.edit.guidance import guided_calls
from mmdit_probe.models.mmdit import MMDiT
from tests import tiny

PROMPT, STEPS = "a red ring", 3


def by_hand(model: MMDiT, edit: Blur, scale: float, guidance: float, unconditional: bool = True) -> torch.Tensor:
    """Euler steps of u + g (c - u) + s (c - p), one forward each."""
    cond, uncond = model.encode_prompt(PROMPT), model.encode_prompt("")
    scheduler = model.scheduler
    scheduler.set_timesteps(STEPS)
    size = model.transformer.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(5))
    sigmas = scheduler.sigmas.tolist()
    for k in range(STEPS):
        c = model.denoise(latents, sigmas[k], cond)
        with probe(model, edits=edit):
            p = model.denoise(latents, sigmas[k], cond)
        base = c
        if unconditional:
            u = model.denoise(latents, sigmas[k], uncond)
            base = u + guidance * (c - u)
        latents = latents + (sigmas[k + 1] - sigmas[k]) * (base + scale * (c - p))
    return latents


@pytest.mark.parametrize("variant", ["sd3", "sd35"])
def test_it_is_the_formula_at_every_step(variant: str) -> None:
    model = MMDiT(tiny.pipeline(variant))
    edit = Blur("image", "text", layers=[0, 2])
    expected = by_hand(model, edit, 2.0, 4.0)
    options: dict[str, Any] = {"steps": STEPS, "seed": 5, "output_type": "latent"}
    with perturbed_guidance(model, edit) as guided:
        images = guided.generate(PROMPT, scale=2.0, guidance=4.0, **options)
    assert (images - expected).abs().max() < 1e-4
    stock = model.generate(PROMPT, guidance=4.0, **options)
    assert (images - stock).abs().max() > 1e-2
    with guided_calls(model, edit, scale=2.0, guidance=4.0):
        wrapped = model.generate(PROMPT, guidance=4.0, **options)
    assert (wrapped - expected).abs().max() < 1e-4
    assert torch.equal(model.generate(PROMPT, guidance=4.0, **options), stock)  # everything is taken off again


def test_without_classifier_free_guidance() -> None:
    model = MMDiT(tiny.pipeline())
    edit = Blur("image", "text", layers=[1])
    expected = by_hand(model, edit, 3.0, 1.0, unconditional=False)
    options: dict[str, Any] = {"steps": STEPS, "seed": 5, "output_type": "latent"}
    with perturbed_guidance(model, edit) as guided:
        assert (guided.generate(PROMPT, scale=3.0, guidance=1.0, **options) - expected).abs().max() < 1e-4
    with guided_calls(model, edit, scale=3.0, guidance=1.0):
        assert (model.generate(PROMPT, guidance=1.0, **options) - expected).abs().max() < 1e-4


def test_scale_zero_and_the_idle_hook_are_stock(tiny_directory: Any) -> None:
    model = load(str(tiny_directory))
    options: dict[str, Any] = {"steps": 2, "seed": 5, "guidance": 4.0, "output_type": "latent"}
    stock = model.generate(PROMPT, **options)
    with perturbed_guidance(model, Blur("image", "text", layers=[1])) as guided:
        assert torch.equal(guided.generate(PROMPT, scale=0.0, **options), stock)
        assert torch.equal(model.generate(PROMPT, **options), stock)
    neutral = Blur("image", "text", layers=[1], sigma=0)
    with perturbed_guidance(model, neutral) as guided:
        assert (guided.generate(PROMPT, scale=5.0, **options) - stock).abs().max() < 1e-4


def test_the_first_step_is_guided_too() -> None:
    model = MMDiT(tiny.pipeline())
    options: dict[str, Any] = {"steps": 1, "seed": 5, "guidance": 4.0, "output_type": "latent"}
    stock = model.generate(PROMPT, **options)
    with perturbed_guidance(model, Blur("image", "text", layers=[1])) as guided:
        assert (guided.generate(PROMPT, scale=2.0, **options) - stock).abs().max() > 1e-3


def test_sweep_pairs_every_setting_with_stock(tiny_model: MMDiT) -> None:
    from mmdit_probe.experiments import Generate

    ask = Generate(
        prompts=[PROMPT, "a cat"], perturb_layers="0,2", perturb_scale=[0, 2.5], control="noise", num_steps=2,
        guidance=4.0, seed=3, batch=2,
    )  # fmt: skip
    together, each = (replace(ask, sweep=sweep).run(tiny_model, progress=False) for sweep in ("none", "layer"))
    assert len(together.table) == 2 * (1 + 2) and len(each.table) == 2 * (1 + 2 * 2)
    for result, layers in ((together, "0,2"), (each, "0")):
        table = result.table
        assert set(table["scale"]) == {0.0, 2.5}
        assert (table[table["scale"] == 0]["change"] == 0).all()
        assert (table[table["scale"] != 0]["change"] > 0).all()
        summary = result.summary
        row = summary[(summary["layers"] == layers) & (summary["control"] == "none")].iloc[0]
        assert row["difference"] == pytest.approx(row["mean"])  # stock changes by 0


def test_generate_command(tiny_directory: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import json
    from pathlib import Path

    from mmdit_probe.cli.app import main

    monkeypatch.chdir(tmp_path)
    base = ["generate", "--model", str(tiny_directory), "--prompts", PROMPT, "--num-steps", "2", "--guidance", "3"]

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([*base, *arguments])
        return int(stopped.value.code or 0)

    assert run("--out", "plain", "--json") == 0
    assert len(json.loads(capfd.readouterr().out)["settings"]) == 1
    assert [path.name for path in Path("plain/images").iterdir()] == ["000-stock.png"]
    assert run("--perturb-layers", "0-1", "--sweep", "layer", "--perturb-scale", "1,2", "--out", "sweep", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert {(row["layers"], row["scale"]) for row in document["settings"]} == {
        ("", 0.0), ("0", 1.0), ("0", 2.0), ("1", 1.0), ("1", 2.0),
    }  # fmt: skip
    assert {"generate.png", "sweep.png", "by_setting.csv"} <= {path.name for path in Path("sweep").iterdir()}
    assert run("--perturb-layers", "7") == 2
    assert "layer 7" in capfd.readouterr().err
    assert run("--perturb-layers", "1", "--perturb-scale", "two") == 2
    assert "number" in capfd.readouterr().err


def test_another_probe_sees_the_forward_without_the_edit(tiny_model: MMDiT) -> None:
    """The perturbed forward is none of the denoising call that the rows are labelled with."""
    text, latents = tiny_model.encode_prompt(PROMPT), torch.randn(1, 4, 8, 8)

    def masses() -> Any:
        with probe(tiny_model, AttentionMass()) as run:
            tiny_model.denoise(latents, 0.5, text)
        return run[AttentionMass].table()

    stock = masses()
    with guided_calls(tiny_model, Scale("image", "text", layers=[0]), scale=2.0, guidance=1.0):
        assert masses().equals(stock)
    with probe(tiny_model, edits=Scale("image", "text", layers=[0])):
        assert not masses().equals(stock)
