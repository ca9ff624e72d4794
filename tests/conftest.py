"""Shared fixtures: tiny random pipelines, built once per session and copied where a test changes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
