"""Nothing lies on the wrong device: all of the chain on a simulated one, which a machine without a GPU has, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch registers no device from Python",
)
def test_a_device_gives_the_numbers_of_the_processor_and_no_operand_lies_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_simulated_device", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"masses", "norms", "maps", "blurred", "iseg", "operations", "adapter", "validation"} <= set(told)
    for name, (difference, size) in told.items():
        assert size > 0, name
        assert difference <= 1e-5 * max(1.0, size), name


def test_the_simulated_device_refuses_what_a_gpu_refuses() -> None:
    """The control: without it the test above could not fail."""
    code = """
import numpy as np, torch
from tests.simulated_device import simulated_device
with simulated_device() as device:
    there, here = torch.ones(3).to(device), torch.ones(3)
    index = torch.tensor([0], device=device)
    wrong = [lambda: there + here, lambda: np.asarray(there), lambda: here[index], lambda: torch.cat([there, here]),
             lambda: torch.randn(3, device=device, generator=torch.Generator()), lambda: there.numpy(),
             lambda: torch.nn.Linear(3, 1)(there)]
    for number, what in enumerate(wrong):
        try:
            what()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit(f"{number} was let through")
    there[1:] *= 2.0  # what a GPU lets through
    assert (there * torch.tensor(2.0))[torch.tensor([1])].cpu().tolist() == [4.0]
    assert torch.arange(3, device=device).device == device and there.sum().item() == 5.0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
