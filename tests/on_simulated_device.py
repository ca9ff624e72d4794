"""What the package does on the simulated device, beside the same on the processor. Behind `test_device.py`.

python -m tests.on_simulated_device FOLDER        # JSON: what -> largest difference, largest value
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mmdit_probe import AttentionMass, TextMaps, ValueNorm, probe, word_maps
from mmdit_probe.edit import Blur
from mmdit_probe.experiments import BlockOperations, ContributionBudget
from mmdit_probe.magnet import MagnetOptions, train
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.segment import Reading, discover, segment
from tests import tiny
from tests.magnet.test_families import Pictures
from tests.simulated_device import NAME, simulated_device

PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
SAMPLED: dict[str, Any] = {"steps": 2, "seed": 0}
Check = Callable[[MMDiT, Path], dict[str, Any]]
"""Something done with a model and an empty folder: arrays by name, or tables whose numbers count."""


def rows(model: MMDiT, _: Path) -> dict[str, Any]:
    with probe(model, AttentionMass(), ValueNorm(), TextMaps()) as run:
        pictures = model.generate("red ring", **SAMPLED)
    return {
        "masses": run[AttentionMass].table()["mass"], "norms": run[ValueNorm].table()["norm"],
        "maps": run[TextMaps].maps(1), "pictures": pictures,
    }  # fmt: skip


def edited(model: MMDiT, _: Path) -> dict[str, Any]:
    with probe(model, edits=Blur(layers=[1])):
        return {"blurred": model.generate("red ring", **SAMPLED)}


def maps(model: MMDiT, _: Path) -> dict[str, Any]:
    return {"word map": word_maps(model, "red ring", num_steps=2)["ring"].array}


def segments(model: MMDiT, _: Path) -> dict[str, Any]:
    ways = {"seg4diff": "none", "iseg": "affinity+pamr", "diffsegmenter": "none"}
    found = {
        name: segment(model, PICTURE, ["ring", "cat"], Reading(layers=[1]), method=name, refine=refine)
        for name, refine in ways.items()
    }
    return {name: one.labels for name, one in found.items()} | {
        "diffcut": discover(model, PICTURE, Reading(layers=[1]), method="diffcut").labels
    }


def experiments(model: MMDiT, _: Path) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompts": "red ring", "limit": 1, "num_steps": 2}
    return {
        "contribution": ContributionBudget(**asked).run(model, progress=False).table["norm"],
        "operations": BlockOperations(**asked, layers="1").run(model, progress=False).table["change"],
    }


def trained(model: MMDiT, folder: Path) -> dict[str, Any]:
    options = MagnetOptions(
        layers=(1,), train_steps=3, batch=2, rank=2, warmup=1, rate=0.01, lora_streams="joint", validate_every=3
    )
    result = train(model, Pictures(), options, held_out=[Pictures()[0]], out=folder)
    weights = load_file(next(result.lora.glob("*.safetensors")))
    return {
        "adapter": torch.cat([weight.flatten() for name, weight in sorted(weights.items()) if "lora_B" in name]),
        "losses": result.log["loss"], "validation": result.validation["miou"],
    }  # fmt: skip


CHECKS: tuple[Check, ...] = (rows, edited, maps, segments, experiments, trained)


def numbers(found: Any) -> np.ndarray:
    return np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found, dtype=np.float64)


def model_on(device: torch.device | str) -> MMDiT:
    return MMDiT(tiny.pipeline("sd3").to(device), "tiny", tiny.T5_LENGTH)


def main(folder: Path) -> None:
    told: dict[str, tuple[float, float]] = {}
    with simulated_device() as device:
        for check in CHECKS:
            stock, model = check(model_on("cpu"), folder / f"cpu-{check.__name__}"), model_on(device)
            found = check(model, folder / f"{NAME}-{check.__name__}")
            assert model.device == device
            for name, expected in stock.items():
                difference = np.abs(numbers(found[name]) - numbers(expected)).max()
                told[name] = float(difference), float(np.abs(numbers(expected)).max())
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
