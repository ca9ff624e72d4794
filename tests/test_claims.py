"""Numbers that pages state are those of the table they name, in a comment behind them that no reader sees:

.62 [.60, .65]<!-- analyses/results/presence/presence.csv; what=trained: map's mean; auc, low, high -->

A file (CSV, or Markdown whose tables have their heading as `section`), what tells the one row, and the columns: as many
numbers before the comment as stand in these cells. Of the README, which is read as a file too, they stand here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "mmdit_probe" / "assets" / "README.md"]
README = (
    "1e-6<!-- benchmarks/results/situations.md; way of running=a prompt of 700 tokens; largest error of a mass -->",
    "4e-5"
    "<!-- benchmarks/results/situations.md; way of running=with guidance, under autocast; largest error of a mass -->",
    "1.06 [1.05, 1.08]"
    "<!-- benchmarks/results/scaling-avx512-bf16.md; blocks=sd3-medium; image tokens=1024; way=masses; time ratio -->",
    "1.49 [1.46, 1.55]<!-- benchmarks/results/peers-avx512-bf16.md; section=sd3-medium, 1024 image tokens, bfloat16; "
    "way=ConceptAttention; time ratio -->",
    "2.01 [1.98, 2.07]<!-- benchmarks/results/peers-avx512-bf16.md; section=sd3-medium, 1024 image tokens, bfloat16; "
    "way=attention-map-diffusers; time ratio -->",
    "1.18 [1.17, 1.23]<!-- benchmarks/results/overhead-avx512-bf16.md; dtype=float32; way=probe; time ratio -->",
)
CLAIM = re.compile(r"<!-- (\S+\.(?:csv|md)); (.*?) -->", re.S)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?( %)?")


def rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV, or of all tables of a Markdown file."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
        return
    section, header = "", None
    for line in path.read_text(encoding="utf-8").splitlines():
        section = line.lstrip("# ") if line.startswith("#") else section
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells and header and not set(line) <= set("|-: "):
            yield dict(zip(header, cells, strict=False)) | {"section": section}
        header = (header or cells) if cells else None


def same(printed: re.Match[str], cell: str) -> bool:
    """Whether a printed number is the cell's, rounded as it is printed."""
    text, value = printed[0].removesuffix(" %"), float(cell) * (100 if printed[1] else 1)
    if "e" in text:
        return float(text) == value
    return abs(float(text) - value) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-9


def wrong(text: str) -> list[str]:
    """The claims of a text that their tables do not show."""
    found = []
    for claim in CLAIM.finditer(text):
        *told, columns = " ".join(claim[2].split()).split("; ")
        row_is = dict(one.split("=", 1) for one in told)
        fits = [row for row in rows(ROOT / claim[1]) if row_is.items() <= row.items()]
        cells = [number[0] for name in columns.split(", ") for number in NUMBER.finditer(fits[0][name] if fits else "")]
        printed = list(NUMBER.finditer(CLAIM.sub("", text[: claim.start()])))[-len(cells) :]
        if len(fits) != 1 or not cells or not all(map(same, printed, cells)):
            found.append(f"{' '.join(one[0] for one in printed)} for {cells} in {len(fits)} rows: {claim[0]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_numbers_of_a_page_are_those_of_the_tables(page: Path) -> None:
    assert wrong(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("claim", README)
def test_numbers_of_the_readme_are_those_of_the_tables(claim: str) -> None:
    assert CLAIM.sub("", claim) in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert wrong(claim) == []


def test_a_number_that_is_not_in_the_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.csv").write_text("layer,miou,low\n1,0.625,0.5\n2,0.4,0.1\n", encoding="utf-8")
    (tmp_path / "a.md").write_text("## x\n\n| way | time |\n|-|-:|\n| m | 1.06 [1.05, 1.08] |\n", encoding="utf-8")
    right = [
        "layer 1: .62 [.5<!-- a.csv; layer=1; miou, low -->, ...]",
        "62 %<!-- a.csv; layer=1; miou -->, 1.06 [1.05, 1.1]<!-- a.md; section=x; way=m; time -->",
    ]
    assert [wrong(text) for text in right] == [[], []]
    for text in ("0.61<!-- a.csv; layer=1; miou -->", ".4<!-- a.csv; layer=3; miou -->", ".4<!-- a.csv; miou -->",
                 "1.06 [1.05, 1.07]<!-- a.md; way=m; time -->"):  # fmt: skip
        assert len(wrong(text)) == 1, text


def test_pages_state_such_numbers() -> None:
    assert sum(len(CLAIM.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 20
