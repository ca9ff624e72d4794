"""What `test_two_processes_give_the_step_of_one` launches twice: the same training, half the batch each.

Each process tells at its end whether its group had ended before: registered first, its word is the last.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mmdit_probe.magnet.trainer import train
from tests.magnet.test_trainer import CONFIG, Pictures, fresh

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    told = out.with_name(f"group-{os.environ['RANK']}")
    atexit.register(lambda: told.write_text("left" if torch.distributed.is_initialized() else "ended"))
    train(fresh(), Pictures(), replace(CONFIG, train_steps=2, batch=2), out=out)
