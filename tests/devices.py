"""The devices that a test runs on: always the processor, and a GPU where there is one (`pytest -m gpu`).

@pytest.mark.parametrize("device", DEVICES)
def test_something(device: str) -> None: ...
"""

from __future__ import annotations

import pytest
import torch

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
