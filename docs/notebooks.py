"""Tutorials of the site: the notebooks with their committed outputs, as pages.

page = tutorial(Path("notebooks/guided_tour.ipynb"))
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def tutorial(path: Path) -> str:
    """The page of a notebook."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        linked = re.sub(r"`docs/guide/([\w-]+\.md)`", r"[\1](../guide/\1)", source)
        parts.append(linked if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join([*parts, f"This page is `notebooks/{path.name}`, which runs from top to bottom."]) + "\n"


def shown(output: dict[str, Any]) -> str:
    """One output as Markdown; ours and pandas' are HTML, pictures inside."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return f"<div>\n{''.join(data['text/html'])}\n</div>"
    return f"```\n{''.join(data['text/plain']).rstrip()}\n```"
