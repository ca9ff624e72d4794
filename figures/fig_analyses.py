"""Analyses beyond arXiv:2509.18096: what text writes, which layer a word acts at, heads, blocks, noise levels.

    python figures/fig_analyses.py                             # about half an hour on one core
    python figures/fig_analyses.py --only swap --set num_steps=28

Writes `contribution_budget`, `swap_test`, `head_triage`, `block_operations` and `sigma_map` as PNG, PDF and CSV under
`figures/out/<model>/`. Swap test, head triage and sigma map are about the embedded world; of other models the
contribution budget and the block operations are made. What samples many images of an embedded model does so in bfloat16
(`measured_as` in its CSV says so); `--only`, `--set` and `--run` go together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from runs import given, model_of, options_of, run, target, write

from mmdit_probe.errors import run_script
from mmdit_probe.experiments import BlockOperations, ContributionBudget, HeadTriage, SigmaByLayer, SwapTest
from mmdit_probe.experiments.experiment import Experiment
from mmdit_probe.experiments.result import Result
from mmdit_probe.experiments.target import knows_scenes


@dataclass(frozen=True)
class Analysis:
    """An experiment, its options at the committed size, and its figure.

    Attributes:
        file: of the figure. figure: its name in the result. scenes: it reads images or masks of the embedded world.
        samples: it generates many images, in bfloat16 where the model is an embedded one.
    """

    experiment: type[Experiment]
    file: str
    figure: str
    how: dict[str, Any] = field(default_factory=dict)
    scenes: bool = False
    samples: bool = False


ANALYSES = {
    "contribution": Analysis(
        ContributionBudget, "contribution_budget", "contribution_budget", {"limit": 32, "rows": "summary"}
    ),
    "triage": Analysis(HeadTriage, "head_triage", "head_triage", {"limit": 64, "train_limit": 64}, scenes=True),
    "sigma": Analysis(SigmaByLayer, "sigma_map", "sigma_map", {"limit": 32}, scenes=True),
    "blocks": Analysis(BlockOperations, "block_operations", "blocks", {"limit": 32, "num_steps": 14}, samples=True),
    "swap": Analysis(SwapTest, "swap_test", "swap", {"limit": 200, "num_steps": 14}, scenes=True, samples=True),
}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--only", choices=list(ANALYSES), help="one of the figures")
    options = parser.parse_args()
    for name in [options.only] if options.only else ANALYSES:
        one = ANALYSES[name]
        if one.scenes and not knows_scenes(options.model):
            continue
        model = model_of(options)
        if one.samples and knows_scenes(options.model):
            model = replace(model, options={**model.options, "dtype": "bfloat16"})
        experiment = one.experiment(**one.how | given(options, one.experiment))
        result = Result.read(options.run) if options.run else run(experiment, model, options)
        table = result.summary.assign(measured_as=measured_as(result.request))
        write(result.figure(one.figure), target(options, result.model_name, one.file), table)


def measured_as(request: dict[str, Any]) -> str:
    """The settings that decide the numbers, in words."""
    parts = [str(request["dtype"])]
    parts += [f"{request['num_steps']} steps"] if "num_steps" in request else []
    parts += [f"guidance {request['guidance']:g}"] if "guidance" in request else []
    return ", ".join(parts)


if __name__ == "__main__":
    run_script(main)
