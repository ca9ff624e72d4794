"""Every analysis as one object: what is measured per item, how it is summed up, claimed and drawn.

    from mmdit_probe.experiments import Perturb
    result = Perturb(layers="all", prompts="scenes:val", limit=16).run("scenes-sd3")
    result.summary; result.claims; result.figure(); result.save("runs/mine")

Names are resolved on first use; neither the package nor the options of an experiment import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe.errors import UserError, check_known
from mmdit_probe.exports import first_use

if TYPE_CHECKING:
    from mmdit_probe.experiments.attention_budget import AttentionBudget as AttentionBudget
    from mmdit_probe.experiments.attribute import Attribute as Attribute
    from mmdit_probe.experiments.block_operations import BlockOperations as BlockOperations
    from mmdit_probe.experiments.contribution_budget import ContributionBudget as ContributionBudget
    from mmdit_probe.experiments.diagnose import Diagnose as Diagnose
    from mmdit_probe.experiments.evaluate import Evaluate as Evaluate
    from mmdit_probe.experiments.experiment import Experiment as Experiment
    from mmdit_probe.experiments.explore import Explore as Explore
    from mmdit_probe.experiments.feature_pca import FeaturePCA as FeaturePCA
    from mmdit_probe.experiments.generate import Generate as Generate
    from mmdit_probe.experiments.head_triage import HeadTriage as HeadTriage
    from mmdit_probe.experiments.perturb import Perturb as Perturb
    from mmdit_probe.experiments.report import Report as Report
    from mmdit_probe.experiments.result import Result as Result
    from mmdit_probe.experiments.score import Score as Score
    from mmdit_probe.experiments.segment_picture import Discover as Discover, Segment as Segment
    from mmdit_probe.experiments.select_layers import SelectLayers as SelectLayers
    from mmdit_probe.experiments.sigma_map import SigmaByLayer as SigmaByLayer
    from mmdit_probe.experiments.swap_test import SwapTest as SwapTest
    from mmdit_probe.experiments.train_magnet import TrainMagnet as TrainMagnet
    from mmdit_probe.experiments.value_norms import ValueNorms as ValueNorms
    from mmdit_probe.experiments.word_maps import WordMaps as WordMaps

_TABLE = {
    "AttentionBudget": ("attention_budget", "attention-budget"),
    "ValueNorms": ("value_norms", "value-norms"),
    "FeaturePCA": ("feature_pca", "pca"),
    "Diagnose": ("diagnose", "diagnose"),
    "Attribute": ("attribute", "attribute"),
    "Perturb": ("perturb", "perturb"),
    "Generate": ("generate", "generate"),
    "SelectLayers": ("select_layers", "select-layers"),
    "Score": ("score", "score"),
    "Evaluate": ("evaluate", "evaluate"),
    "ContributionBudget": ("contribution_budget", "contribution-budget"),
    "SwapTest": ("swap_test", "swap-test"),
    "BlockOperations": ("block_operations", "block-operations"),
    "HeadTriage": ("head_triage", "head-triage"),
    "SigmaByLayer": ("sigma_map", "sigma-map"),
    "WordMaps": ("word_maps", "maps"),
    "Explore": ("explore", "explore"),
    "Report": ("report", "report"),
    "Discover": ("segment_picture", None),
    "Experiment": ("experiment", None),
    "Result": ("result", None),
    "Segment": ("segment_picture", None),
    "TrainMagnet": ("train_magnet", None),
}
"""Name -> module that it is in, and the command whose runs `experiment_of` reads back."""

OF_COMMAND = {command: name for name, (_, command) in _TABLE.items() if command}
"""Command -> the experiment that it runs."""
MODULES = {name: module for name, (module, _) in _TABLE.items()}
"""Name -> module that it is in."""

_OF_PICTURES = {"image": "images", "stream": "streams"}
_EARLIER: dict[str, dict[str, str]] = {
    "maps": _OF_PICTURES,
    "explore": _OF_PICTURES,
    "pca": {"fit": "basis"},
    "score": {"n": "limit", "maps": "map_sigma"},
    "perturb": {"by": "sweep", "sheet": "shown"},
    "generate": {"each": "sweep"},
    "evaluate": {"tag_split": "tag_dataset", "reference": "as_reference"},
    "select-layers": {"heads": "top_heads", "prompts": "perturb_limit"},
    "sigma-map": {"sigmas": "sigma"},
    "head-triage": {"split": "report", "train": "train_limit"},
}
"""Command -> option of an earlier version -> its name now, for the records of runs."""
_EARLIER_VALUES = {"layers": "layer", "heads": "head", "spans": "span", False: "none", True: "layer"}
"""Value of what is now `sweep` -> its name now."""

__all__ = ["OF_COMMAND", "experiment_of", "read", *MODULES]
__getattr__, __dir__ = first_use(
    __name__, {module: [name for name, of in MODULES.items() if of == module] for module in MODULES.values()}
)


def experiment_of(command: str, options: Mapping[str, Any]) -> Experiment:
    """The experiment of a command, from its options as a run's record holds them: JSON has layers as texts."""
    check_known("command of an experiment", command, OF_COMMAND)
    options = {**options}
    for earlier, name in _EARLIER.get(command, {}).items():
        if earlier in options:
            value = options.pop(earlier)
            options[name] = _EARLIER_VALUES[value] if name == "sweep" else value
    if "options" in options:  # of a method
        options["options"] = [text.replace("stream=", "streams=") for text in options["options"]]
    heads = options.get("heads")
    try:
        by_layer = {"heads": {int(layer): of for layer, of in heads.items()}} if isinstance(heads, Mapping) else {}
        found: Experiment = __getattr__(OF_COMMAND[command])(**{**options, **by_layer})
    except (TypeError, ValueError) as error:
        raise UserError(f"a run of {command} with options of another version: {error}; run it again") from error
    return found


def read(folder: Path | str) -> Result:
    """The result that a run folder holds."""
    found: Result = __getattr__("Result").read(folder)
    return found
