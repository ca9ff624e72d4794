"""Loading and sampling without the libraries' chatter: what they would print at loading is kept for the caller instead.

with quiet(name) as notices:
    pipeline = DiffusionPipeline.from_pretrained(name)
notices                                          # e.g. ["Some weights of ... are newly initialized: ..."]
with barless(pipeline):
    pipeline("a red ring")
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

_LIBRARIES = ("diffusers", "transformers")


class _Listener(logging.Handler):
    def __init__(self, notices: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notices = notices

    def emit(self, record: logging.LogRecord) -> None:
        self.notices.append(record.getMessage())


@contextmanager
def quiet(source: str | Path = ".") -> Iterator[list[str]]:
    """Nothing is printed by diffusers and transformers; their warnings go to the list that is given.

    Args:
        source: what is loaded; unless it lies on this machine, the progress bars of its download stay.

    Whatever loads with these libraries stands inside, and so do imports of their models and processors, which warn of
    packages that are not there. What the caller had set (handlers, verbosity, bars) is in force again afterwards, also
    on error.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    notices: list[str] = []
    with ExitStack() as stack:
        for name in _LIBRARIES:
            stack.enter_context(_listened(logging.getLogger(name), _Listener(notices)))
        for module in (of_diffusers, of_transformers) if Path(source).exists() else ():
            stack.enter_context(_without_bars(module))
        yield notices


@contextmanager
def _listened(logger: logging.Logger, listener: logging.Handler) -> Iterator[None]:
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, _, logger.propagate = before
        logger.setLevel(before[1])


@contextmanager
def _without_bars(module: Any) -> Iterator[None]:
    loud = module.is_progress_bar_enabled()
    module.disable_progress_bar()
    try:
        yield
    finally:
        if loud:
            module.enable_progress_bar()


def reached(source: str) -> dict[str, bool]:
    """What a loader is told of a hub id where the hub is out of reach: its files here alone. Asked of every file, the
    hub's client waits half a minute each time. `AutoModel` needs it as `adapter_kwargs`, too: it looks for an adapter.
    """
    if Path(source).exists():
        return {}
    from huggingface_hub import constants

    answers = _answers(constants.ENDPOINT, constants.HF_HUB_OFFLINE, int(time.monotonic() // 60))
    return {} if answers else {"local_files_only": True}


@lru_cache(maxsize=1)
def _answers(endpoint: str, offline: bool, minute: int) -> bool:
    """Whether the hub answers; asked once a minute, not for every part of a model."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=10)
    except Exception:  # what its client raises is another class in each version; also of one that is set offline
        return False
    return True


@contextmanager
def barless(pipeline: Any) -> Iterator[None]:
    """Without the progress bar of a pipeline, which is what its owner made it again afterwards."""
    before = vars(pipeline).get("_progress_bar_config")
    pipeline.set_progress_bar_config(**(before or {}) | {"disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before
