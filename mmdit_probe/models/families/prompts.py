"""Text streams of the stock pipelines: which tokenizer fills which text positions, and what it reads around the prompt.

    stream("t5", "tokenizer", "text_encoder")        # T5, padded to the pipeline's max_sequence_length

Facts of the diffusers 0.42.1 pipelines, used by `models.families.entries`. Templates are read from the pipeline itself.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.facts import Part, TextStream

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


def template(attribute: str, key: str = "") -> Wrap:
    """A text of the pipeline (or the one it holds under `key`) in which "{}" stands for the prompt."""

    def wrap(pipeline: Any, negative: bool) -> tuple[str, str]:
        found = getattr(pipeline, attribute)
        return _around((found[key] if key else found).format(_MARK))

    return wrap


def numbered_pictures(pipeline: Any, count: int) -> str:
    """Qwen-Image-Edit-Plus: the pictures before the prompt, by number; the template of its predecessor has one."""
    if "<|image_pad|>" in pipeline.prompt_template_encode:
        return ""
    return "".join(f"Picture {k + 1}: <|vision_start|><|image_pad|><|vision_end|>" for k in range(count))


def chat(
    before: str = "",
    *,
    system: Callable[[Any], str] | None = None,
    listed: bool = False,
    component: str = "tokenizer",
    **options: Any,
) -> Wrap:
    """The chat template of the tokenizer (or of another component), with one message by the user.

    Args:
        before: attribute of the pipeline that holds a text put before the prompt, in the same message.
        system: (pipeline) -> text of the system's message, which comes first.
        listed: whether the user's message is a list of contents, with one text.
        options: of `apply_chat_template`.
    """

    def wrap(pipeline: Any, negative: bool) -> tuple[str, str]:
        text = (getattr(pipeline, before) if before else "") + _MARK
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system(pipeline)}]
        messages.append({"role": "user", "content": [{"type": "text", "text": text}] if listed else text})
        return _around(getattr(pipeline, component).apply_chat_template(messages, tokenize=False, **options))

    return wrap


def nucleus_system(pipeline: Any) -> str:
    """The system's message of NucleusMoE-Image, a constant of its module."""
    from diffusers.pipelines.nucleusmoe_image import pipeline_nucleusmoe_image

    return str(pipeline_nucleusmoe_image.DEFAULT_SYSTEM_PROMPT)


def hunyuan_template(pipeline: Any, negative: bool) -> tuple[str, str]:
    """HunyuanVideo: the template that `encode_prompt` takes when it is given none."""
    return _around(_hunyuan_default(pipeline)["template"].format(_MARK))


def hunyuan_cut(pipeline: Any) -> int:
    """HunyuanVideo: the template's own tokens before the prompt."""
    return int(_hunyuan_default(pipeline)["crop_start"])


def _hunyuan_default(pipeline: Any) -> dict[str, Any]:
    default: dict[str, Any] = inspect.signature(type(pipeline).encode_prompt).parameters["prompt_template"].default
    return default


def krea2_prefix(pipeline: Any, negative: bool) -> tuple[str, str]:
    """Krea 2: what comes before the prompt; what comes after it is `krea2_suffix`."""
    return pipeline.prompt_template_encode_prefix, ""


def krea2_suffix(pipeline: Any) -> tuple[str, int]:
    """Krea 2: the end of the template comes after the padding."""
    return pipeline.prompt_template_encode_suffix, int(pipeline.prompt_template_encode_num_suffix_tokens)


def prx_cleaned(pipeline: Any, prompt: str) -> list[list[Part]]:
    """PRX: the prompt in lower case, without addresses, file names and the like.

    Raises:
        UserError: of the pipeline that makes pixels, which cleans prompts and cuts them off in another way.
    """
    if "prompt_max_tokens" in pipeline.config:
        raise UserError(f"{type(pipeline).__name__} reads prompts in another way than PRXPipeline")
    return [traced(pipeline.text_preprocessor.clean_text(prompt), prompt)]


def traced(text: str, prompt: str) -> list[Part]:
    """A text that a pipeline made of a prompt, in parts: what it took from the prompt, upper and lower case alike."""
    # One character each: lower() makes two of some characters.
    asked, made = ([character.lower() for character in of] for of in (prompt, text))
    parts = []
    for tag, start, stop, first, last in difflib.SequenceMatcher(None, asked, made, autojunk=False).get_opcodes():
        if first < last:
            kept = tag == "equal" or (tag == "replace" and stop - start == last - first)
            parts.append((text[first:last], start if kept else -1))
    return parts


def inverted(tokenizer: str) -> Callable[[Any, str], list[list[Part]]]:
    """The prompt, in which the tokens of a textual inversion's further vectors follow that of the first."""

    def texts(pipeline: Any, prompt: str) -> list[list[Part]]:
        convert = getattr(pipeline, "maybe_convert_prompt", None)  # FluxControlNetPipeline loads none
        text = prompt if convert is None else convert(prompt, getattr(pipeline, tokenizer))
        return [[(prompt, 0)] if text == prompt else traced(text, prompt)]

    return texts


def longcat_pieces(pipeline: Any, prompt: str) -> list[list[Part]]:
    """LongCat-Image: what stands in quotation marks is read character by character, the marks too."""
    from diffusers.pipelines.longcat_image import pipeline_longcat_image

    split = pipeline_longcat_image.split_quotation(prompt)
    pieces = [piece for text, quoted in split for piece in (text if quoted else [text])]
    places = itertools.accumulate((len(piece) for piece in pieces), initial=0)
    # The splitting may change words with an apostrophe in them; then the pieces are not the prompt's.
    if "".join(pieces) != prompt:
        return [[(piece, -1)] for piece in pieces]
    return [[(piece, place)] for piece, place in zip(pieces, places, strict=False)]


def spoken(pipeline: Any, prompt: str) -> list[list[Part]]:
    """A blank in place of an empty prompt."""
    return [[(prompt, 0)] if prompt else [(" ", -1)]]


def glm_glyphs(pipeline: Any, prompt: str) -> list[list[Part]]:
    """GLM-Image: only the prompt's texts in quotation marks, one by one; before each a pad where they are even in
    number."""
    found = pipeline.get_glyph_texts(prompt)[0] or [""]
    pad = [(pipeline.tokenizer.pad_token, -1)] if len(found) % 2 == 0 else []
    return [[*pad, (text, place)] for text, place in zip(found, _places(found, prompt), strict=True)]


def hunyuan_image_glyphs(pipeline: Any, prompt: str) -> list[list[Part]]:
    """HunyuanImage: the prompt's texts in quotation marks, for the encoder of glyphs."""
    from diffusers.pipelines.hunyuan_image import pipeline_hunyuanimage

    return _glyphs(pipeline_hunyuanimage.extract_glyph_text(prompt), prompt)


def hunyuan_video15_glyphs(pipeline: Any, prompt: str) -> list[list[Part]]:
    """HunyuanVideo 1.5: the prompt's texts in quotation marks, for the encoder of glyphs."""
    from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5

    return _glyphs(pipeline_hunyuan_video1_5.extract_glyph_texts(prompt), prompt)


def _glyphs(listed: str | None, prompt: str) -> list[list[Part]]:
    """The parts of 'Text "one". Text "two". ', a list of what the prompt has in quotation marks."""
    if listed is None:
        return []
    before, between, after = 'Text "', '". Text "', '". '
    texts = listed.removeprefix(before).removesuffix(after).split(between)
    parts: list[Part] = []
    for text, place in zip(texts, _places(texts, prompt), strict=True):
        parts += [(between if parts else before, -1), (text, place)]
    return [[*parts, (after, -1)]]


def _places(texts: Sequence[str], prompt: str) -> list[int]:
    """Where texts stand in quotation marks in the prompt; -1 where they do not. Repeated ones are taken in order."""
    found: list[int] = []
    for text in texts:
        places = [match.start(1) for match in re.finditer(f"(?<=['\"‘“「])({re.escape(text)})(?=['\"’”」])", prompt)]
        found.append(next((place for place in places if place not in found), -1))
    return found


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


def flux2_pieces(pipeline: Any, prompt: str) -> list[list[Part]]:
    """Flux.2: the prompt without the token of a picture; the distilled ones leave it as it is."""
    token = "[IMG]"
    pieces = prompt.split(token) if hasattr(pipeline, "system_message") else [prompt]
    places = itertools.accumulate((len(piece + token) for piece in pieces), initial=0)
    return [list(zip(pieces, places, strict=False))]


def lumina2_system(pipeline: Any, negative: bool) -> tuple[str, str]:
    """Lumina 2: a system prompt before the prompt, and none before the negative prompt."""
    return ("", "") if negative else (f"{pipeline.system_prompt} <Prompt Start> ", "")


def attribute(name: str, key: str = "") -> Callable[[Any], int]:
    """A number that the pipeline holds (under `key`)."""
    return lambda pipeline: int(getattr(pipeline, name)[key] if key else getattr(pipeline, name))


def _around(rendered: str) -> tuple[str, str]:
    before, _, after = rendered.partition(_MARK)
    return before, after
