"""What `test_two_processes_give_the_step_of_one` launches twice: the same training, half the batch each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mmdit_probe.magnet.trainer import train
from tests.magnet.test_trainer import CONFIG, Pictures, fresh

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(fresh(), Pictures(), replace(CONFIG, steps=2, batch=2), out=Path(sys.argv[1]))
