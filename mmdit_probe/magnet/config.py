"""Every choice of a MAGNET training, stated once: type, default, range and help text; defaults are the paper's.

    >>> MagnetOptions(layers=(4,), train_steps=200).effective(processes=2)
    16
    >>> recipe("ours", layers=(4,)).max_grad_norm
    1.0

Source: arXiv:2509.18096 section 4.3 and appendix A, and its published code where the paper is silent. One deliberate
difference: the paper's figure of 1e-5 for the learning rate is not what its code ran (1e-4), so 1e-4 is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from mmdit_probe.data.prompt_sets import SETS
from mmdit_probe.data.sources import NAMES
from mmdit_probe.errors import UserError, check_known
from mmdit_probe.options import LAST_SEED, Option, check, described
from mmdit_probe.segment.settings import parse_steps
from mmdit_probe.specs import Spec, check_spec, layer_indices

Space = Literal["logit", "probability"]
Normalise = Literal["none", "minmax"]
Masks = Literal["class", "part", "self", "self-segments", "none"]
Alignment = Literal["token", "head", "none"]

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Tracker -> the packages of which accelerate needs one."""

_LEVEL: dict[str, Alignment] = {
    "class": "token",
    "part": "head",
    "self": "token",
    "self-segments": "head",
    "none": "none",
}
DATA, ALIGNMENT, LOSS, LORA, OPTIMISER, LOOKS = "Data", "Alignment", "Loss", "LoRA", "Optimiser", "On the way"
"""Panels. Options of the first say what is read (the data describe themselves), of the last what is looked at on the
way: neither is part of what decides a training on given data. No torch here: `--help` reads this."""

_data, _maps, _loss, _lora, _optimiser, _looks = (
    partial(Option, panel=panel) for panel in (DATA, ALIGNMENT, LOSS, LORA, OPTIMISER, LOOKS)
)

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"streams": "clip"},
    "ours": {
        "lora_streams": "joint", "space": "probability", "normalise": "minmax", "rate": 3e-3, "max_grad_norm": 1.0,
        "train_steps": 400, "warmup": 20, "drop_prompt": 0.1,
    },
}  # fmt: skip
"""What a recipe changes in the defaults. "paper": LoRA of rank 16 on the image stream of all layers, maps before the
softmax, CLIP's tokens, rate 1e-4, gradient norm 0.01, 0.1 focal + 0.2 dice. "ours": chosen on validation scenes of the
embedded model (`analyses/magnet_scenes.py`)."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the objective and of the matching cost; the defaults are the paper's (its code's for the matcher)."""

    flow_weight: Annotated[float, _loss("Weight of flow matching.", min=0, max=1e6)] = 1.0
    mask_weight: Annotated[float, _loss("lambda_mask, of focal and dice.", min=0, max=1e6)] = 1.0
    focal_weight: Annotated[float, _loss("lambda_focal.", min=0, max=1e6)] = 0.1
    dice_weight: Annotated[float, _loss("lambda_dice.", min=0, max=1e6)] = 0.2
    focal: Annotated[
        Literal["paper", "released"],
        _loss("paper, or released: the published code's, which took logits for probabilities."),
    ] = "paper"
    focal_alpha: Annotated[float, _loss("Class balance of the focal loss; negative: none.", min=-1, max=1)] = 0.25
    focal_gamma: Annotated[float, _loss("Focus of the focal loss.", min=0, max=16)] = 2.0
    match_focal: Annotated[float, _loss("Focal share of the matching cost.", min=0, max=1e6)] = 0.02
    match_dice: Annotated[float, _loss("Dice share of the matching cost.", min=0, max=1e6)] = 1.0


@dataclass(frozen=True, kw_only=True)
class MagnetOptions(LossWeights):
    """Options of a training; `trainer.train` uses all but the data's, `run.run` those too.

    Raises:
        UserError: an option outside its type, choices or range, or two that exclude each other.
    """

    layers: Annotated[Spec | None, _maps("Layers whose maps are aligned, 0-based: 9, 7-11 or 0,9; averaged.")] = None
    selection: Annotated[Path | None, _maps("LayerSelection file of select-layers, whose layers are taken.")] = None
    dataset: Annotated[
        str,
        _data(
            "scenes:train; a folder of pictures with captions and masks; coco-stuff:ROOT, coco-panoptic:ROOT, "
            "coco-instances:ROOT; or sa1b:ROOT.",
            values=NAMES,
        ),
    ] = "scenes:train"
    masks: Annotated[
        Masks, _data("class (named), part (scenes), self (the model's own maps), self-segments, or none: the control.")
    ] = "class"
    prompt_kind: Annotated[
        Literal["list", "caption", "mixed"] | None,
        _data("list (class names), caption, or mixed (scenes).", shown_default="list where masks have names"),
    ] = None
    limit: Annotated[int | None, _data("Use the first LIMIT pictures.", min=1, shown_default="1000 of scenes")] = None
    split: Annotated[str, _data("Split of COCO.")] = "train2017"
    fit: Annotated[Literal["crop", "squash"], _data("How pictures on disk meet the model's size.")] = "crop"
    captions: Annotated[
        Path | None, _data("Captions as JSON, used instead of the data's own; --caption-model extends it.")
    ] = None
    caption_model: Annotated[
        str | None, _data("Image-to-text model (folder or hub id) that writes the captions not yet in --captions.")
    ] = None
    caption_instruction: Annotated[str, _data("What the captioning model is told.")] = ""
    sentences: Annotated[int | None, _data("Sentences of a caption to use.", min=1, shown_default="all")] = None
    refine: Annotated[str, _data("Refinement of the model's own masks.")] = "affinity"

    alignment: Annotated[
        Alignment | None,
        _maps(
            "token: the map of a class's words meets its mask; head: maps of layers x heads x tokens meet masks by "
            "bipartite matching; none: flow matching alone.",
            shown_default="by --masks",
        ),
    ] = None
    space: Annotated[Space, _maps("Maps before (logit) or after (probability) the softmax.")] = "logit"
    normalise: Annotated[Normalise, _maps("Stretch every map to 0..1 over space, or not.")] = "none"
    streams: Annotated[
        str | None, _maps("Text tokens of these encoders only, e.g. clip (the paper).", shown_default="all")
    ] = None
    score_head: Annotated[
        Literal["none", "conv"],
        _maps("conv: the published code's hidden 3-convolution head on the maps, an ablation."),
    ] = "none"
    drop_prompt: Annotated[float, _maps("Share of samples with an empty prompt, without masks.", min=0, max=1)] = 0.0

    lora_layers: Annotated[Spec, _lora("Layers that get an adapter: all, selected, 9, 7-11 or 0,9.")] = "all"
    lora_streams: Annotated[Literal["image", "joint"], _lora("Streams whose projections get an adapter.")] = "image"
    rank: Annotated[int, _lora("Rank.", min=1, max=4096)] = 16
    alpha: Annotated[float, _lora("Scale times rank.", above=0, max=1e6)] = 16.0
    ema: Annotated[
        float, _lora("Decay of an averaged adapter, which is validated and saved; 0: off.", min=0, max=0.999999)
    ] = 0.0

    train_steps: Annotated[int, _optimiser("Optimiser steps.", min=1, max=10**8)] = 3000
    batch: Annotated[int, _optimiser("Samples per process and micro-batch.", min=1, max=65536)] = 8
    accumulation: Annotated[int, _optimiser("Micro-batches per step.", min=1, max=65536)] = 1
    rate: Annotated[float, _optimiser("Learning rate of AdamW.", above=0, max=1)] = 1e-4
    warmup: Annotated[
        int | None, _optimiser("Warm-up steps.", min=0, shown_default="500, at most a sixth of --train-steps")
    ] = None
    floor: Annotated[float, _optimiser("Share of the rate that warm-up starts from.", min=0, max=1)] = 0.01
    decay: Annotated[float, _optimiser("Weight decay.", min=0, max=1)] = 1e-4
    max_grad_norm: Annotated[
        float, _optimiser("Largest gradient norm; larger ones are scaled down.", above=0, max=1e6)
    ] = 0.01
    sigma_mean: Annotated[float, _optimiser("Mean of the logit-normal noise level.", min=-20, max=20)] = 0.0
    sigma_std: Annotated[float, _optimiser("Its standard deviation.", min=0, max=20)] = 0.5
    precision: Annotated[Literal["no", "bf16", "fp16"], _optimiser("Autocast; the adapter stays float32.")] = "no"
    checkpointing: Annotated[bool, _optimiser("Recompute activations to save memory.")] = False
    seed: Annotated[int, _optimiser("Of everything that is drawn.", min=0, max=LAST_SEED)] = 0

    validation: Annotated[
        str | None,
        _looks(
            "Held-out pictures with named masks: scenes:val or a folder.",
            shown_default="scenes:val of scenes",
            values=NAMES,
        ),
    ] = None
    validate_every: Annotated[int, _looks("Steps between validations; 0: at the end.", min=0)] = 0
    validate_limit: Annotated[int, _looks("Held-out pictures.", min=0)] = 64
    validate_sigma: Annotated[float, _looks("Noise level of the validated maps.", above=0, max=1)] = 0.515
    sample_prompts: Annotated[
        str | Sequence[str] | None,
        _looks("Prompts of the sample grid at every validation: a text, a file with one per line, or a set.",
               shown_default="none", values=SETS)
    ] = None  # fmt: skip
    sample_num_steps: Annotated[int, _looks("Sampling steps of the grid.", min=1, max=1000)] = 28
    sample_guidance: Annotated[float, _looks("Guidance scale of the grid.", min=0, max=1000)] = 7.5
    save_every: Annotated[int, _looks("Steps between checkpoints.", min=1)] = 100
    report_to: Annotated[
        Literal["tensorboard", "wandb"] | None, _looks("Tracker of the training log, beside the CSV.")
    ] = None

    def __post_init__(self) -> None:
        check(self)
        if self.layers is None and self.selection is None:
            raise UserError("which layers' maps are to be aligned? Give --layers 9, or --selection from select-layers")
        if self.layers is not None:
            if self.selection is not None:
                raise UserError("--selection names layers already; leave --layers out")
            check_spec(self.layers, layer_indices)
        if str(self.lora_layers) != "selected":
            check_spec(self.lora_layers, layer_indices)
        parse_steps(self.refine)
        if self.caption_model is not None and self.captions is None:
            raise UserError("where are captions kept? Give --captions FILE.json: it is made, and used again next time")
        self._check_held_out()
        if self.warmup_steps > self.train_steps:
            raise UserError(
                f"warm-up of {self.warmup} steps in a training of {self.train_steps}; expected at most as many"
            )
        if self.report_to is not None and not any(map(find_spec, _TRACKERS[self.report_to])):
            raise UserError(
                f"--report-to {self.report_to}: the package is not installed; pip install 'mmdit-probe[track]'"
            )
        if self.score_head == "conv" and self.level != "token":
            raise UserError("the convolution head reads token maps; use it with alignment 'token'")

    def _check_held_out(self) -> None:
        """Pictures that are trained on choose no adapter. Of COCO, validation reads the split that training does not.

        Raises:
            UserError: they would.
        """
        from mmdit_probe.data.sources import same_pictures

        if self.validation is None or self.validate_limit == 0:
            return
        other_split = self.dataset.startswith("coco-") and "train" in self.split
        if same_pictures(self.validation, self.dataset) and not other_split:
            raise UserError(
                f"--validation {self.validation!r} are the pictures that are trained on: they would choose the adapter"
                " that learnt them by heart; name others, or leave it out"
            )

    @property
    def level(self) -> Alignment:
        """The alignment: `alignment`, or what the masks are made for."""
        return self.alignment or _LEVEL[self.masks]

    @property
    def warmup_steps(self) -> int:
        return min(500, self.train_steps // 6) if self.warmup is None else self.warmup

    def effective(self, processes: int = 1) -> int:
        """Samples per optimiser step."""
        return self.batch * self.accumulation * processes

    def as_request(self) -> dict[str, Any]:
        """JSON values of every option that decides the numbers of a training on given data."""
        kept = {field.name for field in described(self) if field.option.panel not in (DATA, LOOKS)} - {"selection"}
        values = {name: value for name, value in asdict(self).items() if name in kept}
        lists = {name: list(v) for name, v in values.items() if not isinstance(v, str) and isinstance(v, Sequence)}
        return values | lists | {"alignment": self.level, "warmup": self.warmup_steps}


def recipe(name: str, **changes: Any) -> MagnetOptions:
    """The options of a recipe (see `RECIPES`), with changes.

    Raises:
        UserError: there is none of that name.
    """
    check_known("recipe", name, RECIPES)
    return MagnetOptions(**{**RECIPES[name], **changes})
