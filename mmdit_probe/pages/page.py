"""One HTML file: the look that all pages share, pictures and data inside, and a policy that forbids the network.

    page = Page.of("title", "<p>body</p>")
    page.save("page.html"); page                    # in a notebook: shown in a frame

Everything that is not written here is escaped by whoever puts it into the body (`html.escape`), and data are JSON in
which no tag can end. Not here: what stands on a page (`pages.explorer`, `pages.report`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from mmdit_probe.results.atomic import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 256
"""Side in pixels above which a picture is kept as JPEG."""


@dataclass(frozen=True, repr=False)
class Page:
    """A page as text. In a notebook it is shown in a frame of its own."""

    title: str
    html: str

    @classmethod
    def of(cls, title: str, body: str, *, script: str = "", data: Mapping[str, Any] | None = None) -> Page:
        """A page of a body.

        Args:
            title: as plain text. body: HTML. script: name of a file of this folder that is run at the end.
            data: for the script, as JSON values.
        """
        text = json.dumps(data or {}, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        html = Template(_file("page.html")).substitute(
            title=escape(title), style=_file("page.css"), body=body, data=text, script=_file(script) if script else ""
        )
        return cls(title, html)

    def save(self, path: Path | str) -> Path:
        """Write the file. Errors as in `results.atomic.replacing`."""
        write_text(Path(path), self.html)
        return Path(path)

    def __repr__(self) -> str:
        return f"Page({self.title!r}, {len(self.html) / 1e6:.1f} MB); save it with .save(path)"

    def _repr_html_(self) -> str:
        """The page in a frame that may run its script and nothing else."""
        return (
            f'<iframe title="{escape(self.title)}" sandbox="allow-scripts" style="width:100%;height:860px;border:0"'
            f' srcdoc="{escape(self.html)}"></iframe>'
        )


def picture_url(image: Image) -> str:
    """A picture as a data URL: small ones exactly (PNG), large ones as JPEG."""
    kind = "PNG" if max(image.size) <= LARGE else "JPEG"
    buffer = BytesIO()
    image.convert("RGB").save(buffer, format=kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return data_url(buffer.getvalue(), kind.lower())


def data_url(content: bytes, kind: str = "png") -> str:
    """An image file as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _file(name: str) -> str:
    return files("mmdit_probe.pages").joinpath(name).read_text("utf-8")
