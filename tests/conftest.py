"""Shared fixtures: tiny random pipelines, built once per session and copied where a test changes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # the width of the terminal that the tests were started from


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and several test workers share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny-sd3"))


@pytest.fixture
def pipe() -> Any:
    from tests import tiny

    return tiny.pipeline("sd3")


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """A tiny SD3 with random weights, shared: a test that changes it builds its own."""
    from mmdit_probe.models.mmdit import MMDiT
    from tests import tiny

    return MMDiT(tiny.pipeline("sd3"), "tiny", tiny.T5_LENGTH)


@pytest.fixture(scope="session")
def scenes_model() -> Any:
    """The embedded model, shared: a test that changes it loads its own."""
    from mmdit_probe import load

    return load("scenes-sd3")
