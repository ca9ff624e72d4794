"""How commands talk: results on stdout, progress and remarks on stderr, one JSON document with `--json`.

output = Output(quiet=False, as_json=False)
with output.progress.bar("prompts", total=50) as advance: ...
output.result({"run": "runs/..."}, [table], path)
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from mmdit_probe.cli.tables import show
from mmdit_probe.errors import ProbeWarning
from mmdit_probe.experiments.progress import Progress
from mmdit_probe.experiments.text import Text, records

PIPED_WIDTH = 140
"""Columns when stdout is no terminal and COLUMNS asks for none: tables are not folded to a width that nobody has."""


class Output:
    """Where the parts of a command's answer go."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, debug: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns
        self.out = Console(width=width, highlight=False, emoji=False, markup=False)
        self.progress = Progress(quiet, not as_json, show)
        if not debug:
            hush_libraries()
            warnings.showwarning = lambda message, *_: self.progress.note(str(message))

    def result(self, document: dict[str, Any], texts: Sequence[Text] = (), path: object = None) -> None:
        """The answer: `document` with `--json`, `path` with `-q`, otherwise tables and lines of text."""
        if self.as_json:
            print(json.dumps(records(document), indent=2, default=str, allow_nan=False))
        elif self.quiet:
            if path is not None:
                print(path)
        else:
            for text in texts:
                show(text, self.out, "the CSV" if path is not None else "--json")


def hush_libraries() -> None:
    """Only errors from the libraries underneath: their advice is about calls that users of a command do not make."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=ProbeWarning)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
