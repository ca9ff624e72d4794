"""Put the trained parts together as a stock StableDiffusion3Pipeline, in memory or as the folder that ships, and take
what ships apart again, so that training can go on from it."""

from __future__ import annotations

import csv
import json
import shutil
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from mmdit_probe.models.load import load
from mmdit_probe.quiet import quiet
from mmdit_probe.scenes.parser import load_parser
from mmdit_probe.scenes.world import SIZE, WORLD_VERSION
from training.loop import adopt, weights
from training.parser import load_trained_parser
from training.session import Session
from training.text import ClipPair, Restorer, clip_config, load_trained_text
from training.tokenizers import clip_tokenizer, t5_tokenizer
from training.transformer import SHIFT, AlignedTransformer, load_trained_transformer
from training.vae import build_vae, load_trained_vae

HOMES = {
    "parser": "scenes-parser",
    "clip": "scenes-clip",
    "t5": "scenes-sd3",
    "vae": "scenes-sd3",
    "transformer": "scenes-sd3",
}
"""Which folder of the assets each stage ends in."""


def first_tower(pair: ClipPair) -> CLIPTextModelWithProjection:
    """The text tower of ``scenes-clip`` as a model of its own."""
    tower = CLIPTextModelWithProjection(CLIPTextConfig(**clip_config(3, "<|endoftext|>").text_config.to_dict()))
    wanted = tower.state_dict()
    tower.load_state_dict({name: tensor for name, tensor in pair.clip.state_dict().items() if name in wanted})
    return tower.eval().requires_grad_(False)


def assemble(session: Session, transformer: SD3Transformer2DModel | None = None) -> Any:
    """The stock pipeline of the parts trained in the working folder; ``transformer`` replaces the one trained there."""
    with quiet():
        from diffusers import StableDiffusion3Pipeline
    pair, t5 = load_trained_text(session.workdir)
    pair.second.set_attn_implementation("sdpa")
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer or load_trained_transformer(session.workdir / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=load_trained_vae(session),
        text_encoder=first_tower(pair),
        tokenizer=clip_tokenizer(),
        text_encoder_2=pair.second,
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(session: Session) -> None:
    """Write what ships into the session's assets: scenes-sd3, scenes-clip, scenes-parser and the training curves.

    The folders are written beside the old ones and moved over them at the end.
    """
    workdir, assets = session.workdir, session.shipped
    fresh = assets / "_fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline = assemble(session)
    # Only the transformer is stored in half precision: diffusers loads its own models in float32 by default,
    # transformers loads in the stored type, and a pipeline of both kinds must run as it is loaded.
    pipeline.transformer.to(torch.float16)
    pipeline.save_pretrained(fresh / "scenes-sd3", safe_serialization=True)
    pair, _ = load_trained_text(workdir)
    pair.clip.half().save_pretrained(fresh / "scenes-clip")
    clip_tokenizer().save_pretrained(fresh / "scenes-clip")
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (fresh / "scenes-clip" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
    (fresh / "scenes-parser").mkdir()
    state = {name: tensor.half() for name, tensor in weights(load_trained_parser(workdir)).items()}
    save_file(state, fresh / "scenes-parser" / "model.safetensors", {"world": str(WORLD_VERSION)})
    for stage, home in HOMES.items():
        curves = fresh / home / "training" / f"{stage}.csv"
        curves.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(workdir / stage / "curves.csv", curves)
    for folder in sorted(fresh.iterdir()):
        target = assets / folder.name
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    fresh.rmdir()


def unpack(session: Session) -> None:
    """Make the shipped weights the last checkpoints of all stages in a working folder; the inverse of ``export``.

    What does not ship starts anew: optimisers, T5's head, and the digits that half precision has cut off.

    Raises:
        UserError: the working folder holds checkpoints.
    """
    workdir, assets = session.workdir, session.shipped
    shipped = load(str(assets / "scenes-sd3"), device="cpu", dtype="float32").pipeline
    torch.manual_seed(0)
    pair, restorer, aligned, vae = ClipPair(), Restorer(), AlignedTransformer(), build_vae()
    pair.clip.load_state_dict(
        CLIPModel.from_pretrained(assets / "scenes-clip", use_safetensors=True).float().state_dict()
    )
    # The first tower ships twice, in the pipeline with all its digits.
    pair.clip.load_state_dict(shipped.text_encoder.state_dict(), strict=False)
    pair.second.load_state_dict(shipped.text_encoder_2.state_dict())
    restorer.encoder.load_state_dict(shipped.text_encoder_3.state_dict())
    aligned.transformer.load_state_dict(shipped.transformer.float().state_dict())
    vae.load_state_dict(shipped.vae.state_dict())
    modules = {
        "parser": load_parser(assets / "scenes-parser"), "clip": pair, "t5": restorer, "vae": vae,
        "transformer": aligned,
    }  # fmt: skip
    for stage, module in modules.items():
        curves = assets / HOMES[stage] / "training" / f"{stage}.csv"
        with curves.open(encoding="utf-8", newline="") as file:
            step = max(int(row["step"]) for row in csv.DictReader(file))
        adopt(workdir / stage, module, step, curves)
