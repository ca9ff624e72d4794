"""Captions of pictures by a transformers captioning model that the user names, kept in a file.

    captioner = Captioner.load("Salesforce/blip-image-captioning-base", device="cuda")     # a folder or a hub id
    texts = cached({"a.jpg": open_a, "b.jpg": open_b}, "captions.json", captioner)

Any model of `AutoModelForImageTextToText` (BLIP, BLIP-2, GIT, LLaVA, ...), decoded greedily. With all captions in the
file, no captioning model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdit_probe.data.text import read_json, regular
from mmdit_probe.errors import UserError, first_line
from mmdit_probe.quiet import quiet, reached
from mmdit_probe.results.atomic import write_json


@dataclass(frozen=True)
class Captioner:
    """A captioning model with its processor; `instruction` is the text it is given, if any."""

    name: str
    model: Any
    processor: Any
    instruction: str = ""
    most_tokens: int = 60

    @classmethod
    def load(cls, name: str, *, instruction: str = "", device: str | torch.device = "cpu") -> Captioner:
        """Load a folder or a hub id.

        Raises:
            UserError: there is none of that name, or it does not write text about pictures.
        """
        with quiet(name):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            try:
                here = reached(name)
                model = AutoModelForImageTextToText.from_pretrained(
                    name, use_safetensors=True, adapter_kwargs=here, **here
                )
                processor = AutoProcessor.from_pretrained(name, **here)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"no captioning model {name!r}: expected a folder or a hub id of an image-to-text model"
                    f" ({first_line(error)})"
                ) from error
        return cls(name, model.to(device).eval().requires_grad_(False), processor, instruction)

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> list[str]:
        """One caption per PIL image."""
        inputs = self._inputs(list(images)).to(self.model.device)
        for key, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[key] = value.to(self.model.dtype)
        written = self.model.generate(**inputs, max_new_tokens=self.most_tokens, do_sample=False, num_beams=1)
        given = inputs.get("input_ids")
        if given is not None and torch.equal(written[:, : given.shape[1]], given):
            written = written[:, given.shape[1] :]  # decoder-only models repeat what they were told
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: list[Any]) -> Any:
        if getattr(self.processor, "chat_template", None):
            ask = [{"type": "text", "text": self.instruction or "Describe this picture in one or two sentences."}]
            talks = [[{"role": "user", "content": [{"type": "image", "image": image}, *ask]}] for image in images]
            return self.processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        text = {"text": [self.instruction] * len(images)} if self.instruction else {}
        return self.processor(images=images, return_tensors="pt", **text)


def cached(
    pictures: Mapping[str, Callable[[], Any]], file: str | Path, captioner: Captioner | Callable[[], Captioner] | None,
    *, batch: int = 8, advance: Callable[[], None] = lambda: None,
) -> dict[str, str]:  # fmt: skip
    """Captions by key, from the file where it has them and from the model where not.

    Args:
        pictures: key -> function that opens the PIL image. file: JSON, made and extended.
        captioner: the model, or a function that loads it when it is needed, or None: the file has to hold them all.
        batch: pictures at a time, after which the file is written. advance: called once per picture.

    Raises:
        UserError: the file is of another model or is no caption file, or captions are missing and there is no model.
    """
    path = Path(file)
    known = _read(path)
    texts: dict[str, str] = known["captions"]
    missing = [key for key in pictures if key not in texts]
    if missing and captioner is None:
        regular(path, '{"captions": {"a.jpg": "..."}}, or a captioning model that writes it')
        raise UserError(
            f"{str(path)!r} has no caption of {missing[0]!r} ({len(missing)} missing); name a captioning model"
        )
    if missing and captioner is not None:
        model = captioner if isinstance(captioner, Captioner) else captioner()
        made_by = {"model": model.name, "instruction": model.instruction}
        if texts and {key: known.get(key) for key in made_by} != made_by:
            raise UserError(
                f"{str(path)!r} holds captions of {known.get('model')!r} ({known.get('instruction')!r}), asked for are"
                f" {made_by['model']!r} ({made_by['instruction']!r}); choose another file"
            )
        for start in range(0, len(missing), batch):
            keys = missing[start : start + batch]
            texts |= dict(zip(keys, model([pictures[key]() for key in keys]), strict=True))
            write_json(path, made_by | {"captions": texts})
            for _ in keys:
                advance()
    return {key: texts[key] for key in pictures}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"captions": {}}
    expected = '{"captions": {"a.jpg": "..."}}'
    known = read_json(path, expected)
    texts = known.get("captions") if isinstance(known, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{str(path)!r} is no caption file; expected {expected}")
    return dict(known)
