"""CLIPScore of pictures and prompts, with any CLIP model that transformers loads.

    scorer = ClipScorer.load("scenes-clip")            # or a folder, or a hub id such as openai/clip-vit-large-patch14
    scorer(images, prompts)                            # one number per pair, 0..100

CLIPScore here is 100 max(cos(image, text), 0) per pair (arXiv:2104.08718 has 2.5 instead of 100), and its mean over
pairs; a score means something only beside the name of the CLIP model, so the name is part of the metric's. Known
libraries clamp the mean instead of the pairs, and fail on transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit_probe import assets
from mmdit_probe.errors import UserError


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model with its tokenizer and image processor; `metric` names the score."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @property
    def metric(self) -> str:
        """E.g. "clipscore[scenes-clip]"."""
        return f"clipscore[{self.name}]"

    @property
    def cosine_metric(self) -> str:
        """Name of the plain cosine, T2I-CompBench's CLIP similarity if the model is ViT-B/32."""
        return f"clip_similarity[{self.name}]"

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> ClipScorer:
        """Load a CLIP model: an embedded one, a folder, or a hub id.

        Raises:
            UserError: there is none of that name, or it is no CLIP model.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        source = str(assets.path(name)) if name in assets.names() else name
        try:
            kind = AutoConfig.from_pretrained(source).model_type
            if kind != "clip":
                raise UserError(f"{name!r} is a {kind!r} model; CLIPScore needs a CLIP model, e.g. scenes-clip")
            model = CLIPModel.from_pretrained(source, use_safetensors=True).float().eval().requires_grad_(False)
            tokenizer = AutoTokenizer.from_pretrained(source)
            processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"no CLIP model {name!r}: expected scenes-clip, a folder or a hub id ({first})") from error
        return cls(Path(name).name, model.to(device), tokenizer, processor)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """CLIPScore per pair [n] of PIL images and prompts. Prompts are cut at the text encoder's length."""
        return 100 * self.cosines(images, prompts, batch).clip(min=0)

    @torch.no_grad()
    def cosines(self, images: Sequence[Any], prompts: Sequence[str], batch: int = 64) -> NDArray[np.float64]:
        """cos(image, text) per pair [n], -1..1."""
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} images for {len(prompts)} prompts; give one prompt per image")
        scores = []
        for start in range(0, len(images), batch):
            pixels = self.processor(images=list(images[start : start + batch]), return_tensors="pt")["pixel_values"]
            text = self.tokenizer(
                list(prompts[start : start + batch]), padding="max_length", truncation=True, return_tensors="pt",
                max_length=self.model.config.text_config.max_position_embeddings,
            )  # fmt: skip
            device = self.model.device
            found = self.model(
                input_ids=text["input_ids"].to(device), attention_mask=text["attention_mask"].to(device),
                pixel_values=pixels.to(device),
            )  # fmt: skip
            image, words = found.image_embeds, found.text_embeds
            scores.append(torch.nn.functional.cosine_similarity(image.double(), words.double(), dim=-1).cpu().numpy())
        return np.concatenate(scores) if scores else np.zeros(0)
