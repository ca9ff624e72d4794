"""How many rows of pictures and prompts one forward takes.

    limit = RowLimit(model)                         # on a GPU as many as its memory holds; RowLimit(model, 8): 8
    limit.run(rows, forward, kind, tokens=4429)     # forward(some of the rows) until all are done

On a GPU a forward of one row is measured for each kind of rows, and those after it fill the memory that is left. On a
CPU more rows save what a call costs whatever its size, until arithmetic is all that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from mmdit_probe.models.mmdit import MMDiT

CPU_TOKENS = 4096
"""Joint tokens of a forward on a CPU: 13 rows of the embedded model, 1 of SD3 at 1024 pixels."""
MOST = 64
"""Rows of a forward at most: a GPU is busy long before, and what is read of them waits in main memory."""
FILLED = 0.8
"""Share of a GPU's free memory that a forward may take."""


class RowLimit:
    """The number of rows of a forward.

    Args:
        model: whose forwards they are. rows: the number; None finds it out. 1 where a text encoder is shown pictures,
            whose pipelines take one prompt at a time.
    """

    def __init__(self, model: MMDiT, rows: int | None = None) -> None:
        if model.references and model.family.reads_pictures:
            rows = 1
        self.model, self.rows = model, rows
        self._most = MOST if rows is None else rows
        self._bytes: dict[Hashable, int] = {}

    @property
    def pictures(self) -> int:
        """How many pictures to read at once, so that forwards are full."""
        device = self.model.device
        if self.rows is not None or device.type != "cuda":
            height, width = self.model.default_size
            return self._at_once(device, None, height * width // self.model.size_multiple**2 + self.model.text_length)
        return max((self._at_once(device, kind, 0) for kind in self._bytes), default=1)

    def run(self, rows: Sequence[Any], forward: Callable[[Sequence[Any]], Any], kind: Hashable, tokens: int) -> None:
        """Call `forward` with all rows, as many at once as is best.

        Args:
            forward: without effect where memory runs out in it. kind: rows of one kind take equal memory.
            tokens: joint tokens of a row.
        """
        start, device = 0, self.model.device
        while start < len(rows):
            some = rows[start : start + self._at_once(device, kind, tokens)]
            try:
                self._measured(device, some, forward, kind)
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                self._most = len(some) // 2
                torch.cuda.empty_cache()
            else:
                start += len(some)

    def _at_once(self, device: torch.device, kind: Hashable, tokens: int) -> int:
        if self.rows is not None:
            return self._most
        if device.type != "cuda":
            return max(1, CPU_TOKENS // tokens)
        if kind not in self._bytes:
            return 1
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, min(self._most, int(FILLED * free) // self._bytes[kind]))

    def _measured(
        self, device: torch.device, rows: Sequence[Any], forward: Callable[[Sequence[Any]], Any], kind: Hashable
    ) -> None:
        """A forward; the first of its kind on a GPU says what a row takes."""
        if kind in self._bytes or self.rows is not None or device.type != "cuda":
            forward(rows)
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(rows)
        self._bytes[kind] = max(1, torch.cuda.max_memory_allocated(device) - before)  # the first is of one row
