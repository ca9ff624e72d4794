"""`mmdit-probe train-magnet`: LoRA mask alignment, section 4.3 of arXiv:2509.18096."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdit_probe.cli.options import SESSION, Session, with_session

DataSource = Annotated[
    str,
    typer.Option(
        "--data",
        help="scenes:train; a folder of pictures with captions and masks; coco-stuff:ROOT, coco-panoptic:ROOT, "
        "coco-instances:ROOT; or sa1b:ROOT.",
    ),
]
Captions = Annotated[
    Path | None, typer.Option(help="Captions as JSON, used instead of the data's own; --caption-model extends it.")
]
CaptionModel = Annotated[
    str | None,
    typer.Option(help="Image-to-text model (folder or hub id) that writes the captions not yet in --captions."),
]
Masks = Annotated[
    str,
    typer.Option(
        help="class (named), part (scenes), self (the model's own maps), self-segments, or none: the control."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="list (class names), caption, or mixed (scenes).", show_default="list where masks have names"),
]
Limit = Annotated[int | None, typer.Option(help="Use the first LIMIT pictures.", show_default="1000 of scenes", min=1)]
Validation = Annotated[
    str | None,
    typer.Option(
        help="Held-out pictures with named masks: scenes:val or a folder.", show_default="scenes:val of scenes"
    ),
]
Layers = Annotated[str | None, typer.Option(help="Layers whose maps are aligned, 0-based: 9, 7-11 or 0,9.")]
Selection = Annotated[Path | None, typer.Option(help="LayerSelection file of select-layers, instead of --layers.")]
LoraLayers = Annotated[str, typer.Option(help="Layers that get an adapter: all, selected, 9, 7-11 or 0,9.")]
Warmup = Annotated[int | None, typer.Option(help="Warm-up steps.", show_default="500, at most a sixth of --steps")]
ScoreHead = Annotated[str, typer.Option(help="none, or conv: the published code's hidden head, an ablation.")]


@with_session
def command(
    layers: Layers = None,
    selection: Selection = None,
    data: DataSource = "scenes:train",
    masks: Masks = "class",
    prompt: Prompt = None,
    limit: Limit = None,
    split: Annotated[str, typer.Option(help="Split of COCO.")] = "train2017",
    captions: Captions = None,
    caption_model: CaptionModel = None,
    caption_instruction: Annotated[str, typer.Option(help="What the captioning model is told.")] = "",
    sentences: Annotated[
        int | None, typer.Option(help="Sentences of a caption to use.", show_default="all", min=1)
    ] = None,
    validation: Validation = None,
    validate_every: Annotated[int, typer.Option(help="Steps between validations; 0: at the end.", min=0)] = 0,
    validate_count: Annotated[int, typer.Option(help="Held-out pictures.", min=0)] = 64,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt of the sample grid at every validation; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 3000,
    batch: Annotated[int, typer.Option(help="Samples per process and micro-batch.", min=1)] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per step.", min=1)] = 1,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-4,
    warmup: Warmup = None,
    max_grad_norm: Annotated[float, typer.Option(help="Largest gradient norm.")] = 0.01,
    decay: Annotated[float, typer.Option(help="Weight decay.")] = 1e-4,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 16.0,
    lora_layers: LoraLayers = "all",
    streams: Annotated[str, typer.Option(help="Projections that get an adapter: image or joint.")] = "image",
    space: Annotated[str, typer.Option(help="Maps before (logit) or after (probability) the softmax.")] = "logit",
    normalise: Annotated[str, typer.Option(help="none, or minmax of every map over space.")] = "none",
    flow_weight: Annotated[float, typer.Option(help="Weight of flow matching.")] = 1.0,
    mask_weight: Annotated[float, typer.Option(help="lambda_mask.")] = 1.0,
    focal_weight: Annotated[float, typer.Option(help="lambda_focal.")] = 0.1,
    dice_weight: Annotated[float, typer.Option(help="lambda_dice.")] = 0.2,
    focal: Annotated[str, typer.Option(help="paper, or released: the published code's defect.")] = "paper",
    focal_alpha: Annotated[float, typer.Option(help="Class balance of the focal loss; negative: none.")] = 0.25,
    focal_gamma: Annotated[float, typer.Option(help="Focus of the focal loss.")] = 2.0,
    match_focal: Annotated[float, typer.Option(help="Focal share of the matching cost.")] = 0.02,
    match_dice: Annotated[float, typer.Option(help="Dice share of the matching cost.")] = 1.0,
    columns: Annotated[str, typer.Option(help="Text tokens whose maps are aligned: all, or clip.")] = "all",
    score_head: ScoreHead = "none",
    sigma_mean: Annotated[float, typer.Option(help="Mean of the logit-normal noise level.")] = 0.0,
    sigma_std: Annotated[float, typer.Option(help="Standard deviation of the same.")] = 0.5,
    drop_prompt: Annotated[float, typer.Option(help="Share of samples with an empty prompt.")] = 0.0,
    ema: Annotated[float, typer.Option(help="Decay of an averaged adapter; 0: off.")] = 0.0,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    fit: Annotated[str, typer.Option(help="crop or squash: how pictures of a folder meet the model's size.")] = "crop",
    refine: Annotated[str, typer.Option(help="Refinement of the model's own masks.")] = "affinity",
    report_to: Annotated[str | None, typer.Option(help="tensorboard or wandb, beside the CSV.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    session: Session = SESSION,
) -> None:
    """Fine-tune a LoRA so that words own their regions: flow matching plus mask alignment of I2T maps.

    Writes lora/ (loads with pipe.load_lora_weights), best/, training.csv, validation.csv and samples/ into a run
    folder. With --lora, that adapter is merged into the model before the new one is trained on it. Several processes:
    accelerate launch --num_processes 2 -m mmdit_probe train-magnet ... Defaults are the paper's.
    """
    given = locals()
    from mmdit_probe.magnet.config import TrainMagnet

    values: Any = {field.name: given[field.name] for field in fields(TrainMagnet) if field.name in given}
    options = TrainMagnet(**values, sample_prompts=tuple(sample_prompt or ()), seed=session.seed)

    from mmdit_probe.cli.session import load_model, output_of, text_of
    from mmdit_probe.magnet.run import run
    from mmdit_probe.models.adapters import merge

    output = output_of(session)
    loaded = load_model(session)
    if session.lora is not None:
        merge(loaded.pipeline)
    result = run(
        options, loaded, text=text_of(session), out=session.out, resume=session.resume, progress=output.progress.bar
    )
    last, first = result.log.iloc[-1], result.log.iloc[0]
    document = {
        "run": result.path, "lora": result.lora, "steps": len(result.log),
        "first": _row(first), "last": _row(last), "validation": result.validation.to_dict("records"),
    }  # fmt: skip
    lines = [f"{name}: {first[name]:.4f} -> {last[name]:.4f}" for name in ("flow", "focal", "dice")]
    if len(result.validation) and "miou" in result.validation:
        scores = result.validation.dropna(subset=["miou"]).tail(4).to_dict("records")
        shown = ", ".join(f"{row['miou']:.3f} at step {row['step']:.0f}" for row in scores)
        lines.append(f"held-out mIoU (present classes, n = {scores[-1]['n']:.0f}): {shown}")
    output.result(document, [*lines, f"adapter: {result.lora}"], result.path)


def _row(row: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in row.items()}
