"""P(yes) of a BLIP question-answering model about the noun phrases of a prompt, after T2I-CompBench's BLIP-VQA.

    asker = BlipAsker.load("Salesforce/blip-vqa-base")            # a folder or a hub id
    asker(images, prompts)                                        # one number per pair, 0..1
    phrases("a red ring left of a blue house")                    # ["a red ring", "a blue house"]

Per phrase the question "<phrase>?"; p = P(yes) / (P(yes) + P(no)) at the first answer token; a prompt's score is the
product over its phrases (one without phrases scores 1). Decoding is the original's, which the class in transformers
does not do by itself: the question starts with [ENC] instead of [CLS], and the answer's logits are read, not sampled.

Not BLIP-VQA: phrases are cut by rule, at prepositions, conjunctions and auxiliaries, where the original takes spaCy's
noun chunks, so the metric has another name. For published numbers export the pictures and run the original evaluator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit_probe.errors import UserError, check_pairs, first_line
from mmdit_probe.quiet import quiet, reached

SIZE = 480
"""Pixels per side that pictures are brought to, as in T2I-CompBench."""
MOST_PHRASES = 8
CUTS = frozenset((
    "about", "above", "across", "against", "along", "among", "and", "around", "as", "at", "before", "behind",
    "below", "beneath", "beside", "between", "bottom", "but", "by", "for", "from", "front", "in", "inside", "into",
    "is", "are", "was", "were", "has", "have", "near", "next", "of", "off", "on", "onto", "or", "out", "outside",
    "over", "past", "left", "right", "side", "than", "that", "through", "to", "top", "toward", "towards", "under",
    "underneath", "up", "upon", "down", "while", "with", "within", "without",
))  # fmt: skip
_BARE = frozenset(("a", "an", "the", "its", "his", "her", "their"))


@dataclass(frozen=True)
class BlipAsker:
    """A BLIP question-answering model with tokenizer and image processor; `metric` names the score."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any
    size: int = SIZE

    @property
    def metric(self) -> str:
        """E.g. "blip_yes[blip-vqa-base]"."""
        return f"blip_yes[{self.name}]"

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> BlipAsker:
        """Load a folder or a hub id.

        Raises:
            UserError: there is none of that name, or it is no BLIP model that answers questions with "yes" and "no".
        """
        from mmdit_probe.segment.clip import image_processor

        with quiet(name):
            from transformers import AutoConfig, AutoTokenizer, BlipForQuestionAnswering

            try:
                here = reached(name)
                config = AutoConfig.from_pretrained(name, **here)
                made_as = (config.architectures or ["?"])[0]
                if config.model_type != "blip" or made_as != "BlipForQuestionAnswering":
                    raise UserError(
                        f"{name!r} is a {made_as} ({config.model_type}); expected a BlipForQuestionAnswering, e.g."
                        " Salesforce/blip-vqa-base"
                    )
                model = BlipForQuestionAnswering.from_pretrained(name, use_safetensors=True, **here)
                tokenizer, processor = AutoTokenizer.from_pretrained(name, **here), image_processor(name)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"no BLIP model {name!r}: expected a folder or a hub id ({first_line(error)})"
                ) from error
        for word in ("yes", "no"):
            if tokenizer.convert_tokens_to_ids(word) in (None, tokenizer.unk_token_id):
                raise UserError(f"the tokenizer of {name!r} does not know the answer {word!r}")
        return cls(Path(name).name, model.float().to(device).eval().requires_grad_(False), tokenizer, processor)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], batch: int = 16) -> NDArray[np.float64]:
        """Score per pair [n] of PIL images and prompts."""
        check_pairs(images, prompts)
        asked = [(k, f"{phrase}?") for k, prompt in enumerate(prompts) for phrase in phrases(prompt)]
        found = self.yes([images[k] for k, _ in asked], [question for _, question in asked], batch)
        scores = np.ones(len(images))
        for (k, _), p in zip(asked, found.tolist(), strict=True):
            scores[k] *= p
        return scores

    def yes(self, images: Sequence[Any], questions: Sequence[str], batch: int = 16) -> Tensor:
        """P(yes) / (P(yes) + P(no)) per pair [n] of PIL images and questions.

        Questions of one length go together: the cross-attention of transformers 5.23's BLIP ignores its mask, so that
        an answer would depend on how far its question is padded.
        """
        most = self.model.config.text_config.max_position_embeddings
        ids = [self.tokenizer(text, truncation=True, max_length=most)["input_ids"] for text in questions]
        answers = torch.zeros(len(ids), dtype=torch.float64)
        for length in sorted({len(one) for one in ids}):
            alike = [k for k, one in enumerate(ids) if len(one) == length]
            for start in range(0, len(alike), batch):
                chunk = alike[start : start + batch]
                answers[chunk] = self._answers([images[k] for k in chunk], torch.tensor([ids[k] for k in chunk]))
        return answers

    @torch.no_grad()
    def _answers(self, images: list[Any], ids: Tensor) -> Tensor:
        """P(yes) / (P(yes) + P(no)) [n] of images and questions [n, length] without padding."""
        model, device = self.model, self.model.device
        pixels = self.processor(
            images=[image.convert("RGB") for image in images], size={"height": self.size, "width": self.size},
            return_tensors="pt",
        )["pixel_values"].to(device)  # fmt: skip
        ids[:, 0] = self._enc
        seen = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        question = model.text_encoder(input_ids=ids.to(device), encoder_hidden_states=seen).last_hidden_state
        start = torch.full((len(ids), 1), model.decoder_start_token_id, device=device)
        logits = model.text_decoder(input_ids=start, encoder_hidden_states=question).logits[:, 0]
        known = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        return logits[:, known].double().softmax(-1)[:, 0].cpu()

    @property
    def _enc(self) -> int:
        """[ENC] follows [DEC], the decoder's start; tokenizers of converted checkpoints lack both."""
        known = self.tokenizer.convert_tokens_to_ids("[ENC]")
        fallback = int(self.model.decoder_start_token_id) + 1
        return fallback if known in (None, self.tokenizer.unk_token_id) else int(known)


def phrases(prompt: str) -> list[str]:
    """The noun phrases of a prompt, cut by rule, at most `MOST_PHRASES`."""
    found: list[list[str]] = [[]]
    for word in re.findall(r"[\w'-]+|[^\w\s]", prompt.lower()):
        if word in CUTS or not word[0].isalnum():
            found.append([])
        else:
            found[-1].append(word)
    return [" ".join(words) for words in found if not _BARE.issuperset(words)][:MOST_PHRASES]
