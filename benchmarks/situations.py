"""What works with what: every situation of tests/observe/situations.py, tried here, as a table in markdown.

python benchmarks/situations.py --out benchmarks/results/situations.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmdit_probe.errors import run_script

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchao", "optimum-quanto", "gguf", "bitsandbytes")


def versions() -> str:
    """What the table was made with, in a sentence."""
    found = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return f"Tried with {', '.join(found)}."


def main() -> None:
    import torch

    from tests.observe.situations import SITUATIONS, markdown

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; printed if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lacking = {situation.lacks: None for situation in SITUATIONS.values() if situation.lacks}
    outcomes = [situation.check() for situation in SITUATIONS.values() if not situation.lacks]
    text = f"{markdown(outcomes)}\n\n{versions()}"
    text += "".join(f" Not tried: {reason}." for reason in lacking)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
