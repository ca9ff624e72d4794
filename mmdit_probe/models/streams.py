"""Text streams of the stock pipelines: which tokenizer fills which text positions, and what it reads around the prompt.

    stream("t5", "tokenizer", "text_encoder")        # T5, padded to the pipeline's max_sequence_length

Facts of the diffusers 0.42.1 pipelines, used by `models.entries`. Templates are read from the pipeline itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdit_probe.models.family import TextStream

Wrap = Callable[[Any, bool], tuple[str, str]]
_MARK = "mmditprobeprompt"
"""Stands for the prompt while a template is rendered."""


def stream(name: str, tokenizer: str = "tokenizer", encoder: str = "text_encoder", **facts: Any) -> TextStream:
    """The stream of one tokenizer, as long as `max_sequence_length` says. The prompt's arguments count with it."""
    number = tokenizer.removeprefix("tokenizer")  # "", "_2", ...
    known: dict[str, Any] = {
        "prompts": (f"prompt{number}",), "negatives": (f"negative_prompt{number}",), "length": "max_sequence_length"
    }  # fmt: skip
    return TextStream(name, (tokenizer,), (encoder,), **(known | facts))


def template(attribute: str) -> Wrap:
    """A text of the pipeline in which "{}" stands for the prompt."""
    return lambda pipeline, negative: _around(getattr(pipeline, attribute).format(_MARK))


def chat(system: str = "", **options: Any) -> Wrap:
    """The tokenizer's chat template, with one message by the user.

    Args:
        system: attribute of the pipeline that holds a text put before the prompt, in the same message.
        options: of `apply_chat_template`.
    """

    def wrap(pipeline: Any, negative: bool) -> tuple[str, str]:
        before = getattr(pipeline, system) if system else ""
        messages = [{"role": "user", "content": before + _MARK}]
        return _around(pipeline.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    return wrap


def flux2_chat(pipeline: Any, negative: bool) -> tuple[str, str]:
    """Flux.2: a system and a user message through the processor; the distilled ones: a user message through Qwen3."""
    if not hasattr(pipeline, "system_message"):
        return chat(add_generation_prompt=True, enable_thinking=False)(pipeline, negative)
    texts = {"system": pipeline.system_message, "user": _MARK}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    rendered = pipeline.tokenizer.apply_chat_template([messages], tokenize=False, add_generation_prompt=False)
    before, after = _around(rendered if isinstance(rendered, str) else rendered[0])
    # The template writes the start token that the tokenizer adds.
    start = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer).bos_token or ""
    return before.removeprefix(start), after


def lumina2_system(pipeline: Any, negative: bool) -> tuple[str, str]:
    """Lumina 2: a system prompt before the prompt, and none before the negative prompt."""
    return ("", "") if negative else (f"{pipeline.system_prompt} <Prompt Start> ", "")


def attribute(name: str) -> Callable[[Any], int]:
    """A number that the pipeline holds."""
    return lambda pipeline: int(getattr(pipeline, name))


def _around(rendered: str) -> tuple[str, str]:
    before, _, after = rendered.partition(_MARK)
    return before, after
