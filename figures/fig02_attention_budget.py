"""Fig. 2b and 2c of arXiv:2509.18096, re-measured: the attention budget of every layer.

    python figures/fig02_attention_budget.py                                   # embedded model: runs, draws, writes
    python figures/fig02_attention_budget.py --run runs/attention-budget/...   # from a run folder that is there

Writes `figures/out/<model>/fig02_attention_budget.{png,pdf,csv}` (the CSV holds the plotted numbers). A run of the same
request (same weights included) is drawn again instead of being repeated; `--fresh` measures anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from mmdit_probe.data import paper_table
from mmdit_probe.observe.summary import COLUMNS, summarise
from mmdit_probe.plots import attention_budget, save
from mmdit_probe.results import read_row_groups
from mmdit_probe.results.folder import read_record

OUT = Path(__file__).parent / "out"
COMMAND, TABLE = "attention-budget", "attention_budget"
PAPER_MODEL = "stable-diffusion-3-medium"


def run_folder(options: argparse.Namespace) -> Path:
    """The run to draw: the one named, or that of the default request, measured now unless it is there."""
    if options.run:
        return options.run
    command = [sys.executable, "-m", "mmdit_probe", COMMAND, "--model", options.model, "--device", options.device, "-q"]
    command += [] if options.fresh else ["--resume"]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-sd3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", type=Path, help="run folder of attention-budget")
    parser.add_argument("--fresh", action="store_true", help="measure even if a finished run is there")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    options = parser.parse_args()
    folder = run_folder(options)
    model = (read_record(folder) or {})["request"]["model"]
    summary = summarise(read_row_groups(folder / f"{TABLE}.parquet", COLUMNS))
    paper = paper_table("budget_by_layer") if PAPER_MODEL in model else None
    target = options.out / Path(model).name / "fig02_attention_budget"
    title = f"{model}: {int(summary.prompts.min())} prompts"
    for path in save(attention_budget(summary, title=title, paper=paper), target):
        print(path)
    summary.to_csv(target.with_suffix(".csv"), index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
