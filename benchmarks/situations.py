"""What works with what: every situation of tests/observe/situations.py, tried here, as a table in markdown.

python benchmarks/situations.py --out benchmarks/results/situations.md
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    import torch

    from tests.observe.situations import SITUATIONS, markdown

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; printed if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = markdown([situation.check() for situation in SITUATIONS.values()])
    if options.out is None:
        print(table)
    else:
        options.out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
