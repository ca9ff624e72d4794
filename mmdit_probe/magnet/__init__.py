"""MAGNET: mask alignment of I2T maps by LoRA (arXiv:2509.18096, section 4.3), on stock diffusers and peft.

    from mmdit_probe import load
    from mmdit_probe.data import ScenesData
    from mmdit_probe.magnet import MagnetOptions, train
    model = load("scenes-sd3")
    train(model, ScenesData("train", 1000), MagnetOptions(layers=(4,), train_steps=200), out="runs/magnet")
    pipe.load_lora_weights("runs/magnet/lora")      # in a program that knows nothing of this package

Not a general fine-tuning tool: what it trains is the attention that reads text into the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdit_probe.exports import first_use

if TYPE_CHECKING:
    from mmdit_probe.magnet.config import MagnetOptions as MagnetOptions, recipe as recipe
    from mmdit_probe.magnet.lora import save_lora as save_lora
    from mmdit_probe.magnet.pseudo import SelfLabelled as SelfLabelled
    from mmdit_probe.magnet.run import run as run
    from mmdit_probe.magnet.tap import TextMapTap as TextMapTap
    from mmdit_probe.magnet.trainer import train as train

_ROOMS = {
    "config": ("MagnetOptions", "recipe"),
    "lora": ("save_lora",),
    "pseudo": ("SelfLabelled",),
    "run": ("run",),
    "tap": ("TextMapTap",),
    "trainer": ("train",),
}

__all__ = [name for names in _ROOMS.values() for name in names]
__getattr__, __dir__ = first_use(__name__, _ROOMS)
