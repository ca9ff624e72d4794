"""JSON documents with a schema version: run.json, selections, the indices of caches.

write_json(path, {"version": VERSION, **data})
data = read_document(path, "run record", VERSION)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmdit_probe.errors import UserError


def read_document(path: Path | str, what: str, version: int) -> dict[str, Any]:
    """A JSON object and its "version"; one without a version is of version 1.

    Args:
        what: names the document in messages. version: the newest that the caller can read.

    Raises:
        UserError: not readable, no JSON object, or of a version that the caller cannot read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not a {what}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{str(path)!r} is not a {what}: it holds a {type(data).__name__}, not an object")
    found = data.setdefault("version", 1)
    if type(found) is not int or found < 1:
        raise UserError(f"{str(path)!r} is not a {what}: its version is {found!r}")
    if found > version:
        raise UserError(
            f"{str(path)!r} is a {what} of version {found}; this mmdit-probe reads up to {version}: update it"
        )
    return data
