"""What commands on a model share: load it without the libraries' own chatter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit_probe.models.mmdit import MMDiT


def open_model(name: str, *, debug: bool, **options: Any) -> MMDiT:
    """`load`, with the bars of a download but not those of reading local files.

    Args:
        name: as in `load`. debug: leave the libraries' bars on.
        options: `device`, `dtype`, `t5` of `load`.
    """
    import diffusers
    import transformers

    from mmdit_probe import assets, load

    if not debug and (name in assets.names() or Path(name).exists()):
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    return load(name, **options)
