"""How commands print rows: as JSON values, as a table for the terminal, and a measurement beside its controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from mmdit_probe.results import RunFolder


def plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values: NaN (no interval with one prompt) becomes null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else float(value)
    return value


def bare_table(columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """An empty table for the terminal, columns right-aligned but for those in `left`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def report_controls(
    folder: RunFolder, stem: str, comparison: pd.DataFrame, claim: str, shown: Callable[[pd.DataFrame], pd.DataFrame],
) -> list[Any]:  # fmt: skip
    """Write `<stem>_controls.csv` and `.md`; the lines for the terminal. Nothing without controls.

    Args:
        comparison: from `results.statistics.compare`. claim: what the value says, in words.
        shown: the rows that the terminal and the markdown show, without columns of little interest.
    """
    if comparison.empty:
        return []
    from mmdit_probe.experiments.controls import CONTROLS
    from mmdit_probe.results.statistics import FEWEST, NOT_ABOVE, TOO_FEW

    comparison.to_csv(folder.path / f"{stem}_controls.csv", index=False, float_format="%.6g")
    part = shown(comparison)
    if part.empty:
        return []
    values = ["n", "value", "control_value", "difference", "low", "high", "verdict"]
    # Columns that say nothing here (every head, every span) are left to the CSV.
    names = [name for name in part.columns if name not in values and (name == "layer" or part[name].nunique() > 1)]
    names += [] if "control" in names else ["control"]
    table = bare_table([*names, "value", "control's", "difference", "verdict"], left=("control", "verdict"))
    lines = [
        f"| {' | '.join([*names, 'n', 'value', 'its control', 'difference [95 % interval]', 'verdict'])} |",
        f"|{'-|' * (len(names) + 5)}",
    ]
    for row in part.to_dict("records"):
        place = [str(row[name]) for name in names]
        gap = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        numbers = [f"{row['value']:.3f}", f"{row['control_value']:.3f}", gap, str(row["verdict"])]
        table.add_row(*place, *numbers)
        lines.append(f"| {' | '.join([*place, str(row['n']), *numbers])} |")
    explained = CONTROLS | {"budget": "a random change of equal size"}
    known = "; ".join(f"{name}: {explained[name]}" for name in dict.fromkeys(part["control"]))
    claimed = (
        f"Claim: {claim}. Paired differences over items, 95 % interval; verdicts are corrected for many comparisons "
        f"(Holm). Controls: {known}."
    )
    failed, undecided = (int((part["verdict"] == verdict).sum()) for verdict in (NOT_ABOVE, TOO_FEW))
    verdict = f"{failed} of {len(part)} comparisons are not above their control."
    if undecided:
        verdict += f" {undecided} have fewer than {FEWEST} items, which decides nothing."
    (folder.path / f"{stem}_controls.md").write_text("\n".join([claimed, "", *lines, "", verdict, ""]), "utf-8")
    return [table, claimed, verdict]
