"""The paper's numbers, as printed or digitised: tables, no code that depends on their values.

    >>> float(paper_table("budget_by_layer").i2t_share.mean().round(3))     # arXiv:2509.18096, Fig. 2b, digitised
    0.672

`paper/README.md` tells where each published number comes from and how sure it is. Not here: anything measured with
this toolkit.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from mmdit_probe.errors import check_known

if TYPE_CHECKING:
    import pandas as pd

_FOLDER = resources.files("mmdit_probe.data") / "paper"


def paper_tables() -> list[str]:
    """Names of the published tables."""
    return sorted(entry.name.removesuffix(".csv") for entry in _FOLDER.iterdir() if entry.name.endswith(".csv"))


def paper_table(name: str) -> pd.DataFrame:
    """A published table; columns and cautions in `paper/README.md`.

    Raises:
        UserError: no table of that name; the message names the closest one.
    """
    import pandas as pd

    check_known("paper table", name, paper_tables())
    with (_FOLDER / f"{name}.csv").open("r", encoding="utf-8") as stream:
        return pd.read_csv(stream)
