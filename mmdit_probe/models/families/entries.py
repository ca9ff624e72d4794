"""Facts of the model families, one entry each, from the diffusers 0.42.1 class it names.

    >>> next(entry for entry in ENTRIES if entry.name == "flux").order
    ('text', 'image')

Every entry is tested against the mechanical layout (`models.discover_layout`), which knows nothing of it. Left out:
classes whose layers make several attention calls, each with some of the queries (`models.families.registry` refuses
them and says why).
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

from mmdit_probe.errors import UserError
from mmdit_probe.models.families import prompts
from mmdit_probe.models.families.facts import Family, TextStream
from mmdit_probe.models.families.prompts import attribute, chat, stream, template
from mmdit_probe.models.families.token_order import (
    Arrangement,
    Extent,
    Inputs,
    Reference,
    Segment,
    frames_first,
    id_runs,
    image_shapes,
    latents,
    packed,
    position_ids,
    samples,
    sequence,
    text_count,
    valid,
)  # fmt: skip

_LENGTH = "max_sequence_length"
_QWEN_EDIT = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
_JOY = "its pipeline makes pictures of a megapixel only, and reads a prompt with a picture in another way than text"
_QUOTED = "what stands in quotation marks"
_DOUBLE = r"transformer_blocks\.(\d+)\.attn"
_SINGLE = r"single_transformer_blocks\.(\d+)\.attn"
_BLOCKS = r"transformer_blocks\.(\d+)\.attn1"


def _reordered(*parts: str) -> Any:
    """Hunyuan's text: valid positions of all parts first, then the masked ones. The parts' masks are named after them;
    text positions T count through the parts in this order."""

    def rule(inputs: Inputs, config: Any) -> Arrangement:
        extent = latents(inputs, config)
        given = [(f"encoder_hidden_states{p}", f"encoder_attention_mask{p}") for p in parts]
        given = [names for names in given if inputs.get(names[0]) is not None]
        if len(given) < 2:
            return sequence(latents, "image", "text")(inputs, config)
        front, back, offset = [], [], 0
        for name, mask in given:
            front.append(valid(inputs[mask], offset))
            back.append(valid(inputs[mask], offset, keep=False))
            offset += int(inputs[name].shape[1])
        pictures: Any = inputs.get("image_embeds")
        count = 0 if pictures is None else int(pictures.shape[1])
        # All-zero picture embeddings are masked (text to video): then they come after the valid text.
        seen = count > 0 and bool(pictures.any())
        found = []
        for row in range(samples(inputs)):
            other: tuple[Segment, ...] = (("other", count),) if count else ()
            text: list[tuple[Segment, ...]] = [tuple(("text", p[row]) for p in part) for part in (front, back)]
            found.append((*extent.image, *(other if seen else ()), *text[0], *(() if seen else other), *text[1]))
        return extent.arranged(found)

    return rule


def _flux2(inputs: Inputs, config: Any) -> Extent:
    """References follow the image, but not with a cache of their keys."""
    if inputs.get("kv_cache_mode"):
        raise _cached("Flux2KleinKVPipeline", "give the picture to Flux2KleinPipeline")
    return position_ids(inputs, config)


def _glm(inputs: Inputs, config: Any) -> Extent:
    """Without the cache that holds the keys of pictures to be edited."""
    caches: Any = inputs.get("kv_caches")
    if caches is not None and caches[0].mode in ("read", "write"):
        raise _cached("GlmImagePipeline with a picture", "probe it without one")
    return latents(inputs, config)


def _cached(pipeline: str, instead: str) -> UserError:
    return UserError(
        f"the references' keys come from a cache ({pipeline}): they are read in calls of their own, and are keys that"
        f" are no tokens of the image's call; {instead}"
    )


def _flux3(inputs: Inputs, config: Any) -> Extent:
    """Reference images come as an input of their own and follow the image."""
    ids: Any = inputs.get("image_cond_ids")
    return replace(position_ids(inputs, config), references=() if ids is None else tuple(id_runs(ids)))


def _framepack(inputs: Inputs, config: Any) -> Arrangement:
    """Frames made before, as references: the older, the coarser; the frames being made, picture embeddings, text. Text
    that is masked is hidden, or cut off."""
    extent = latents(inputs, config)
    patch = config.patch_size
    history = []
    for name, scale in (("latents_history_4x", 4), ("latents_history_2x", 2), ("latents_clean", 1)):
        given: Any = inputs.get(name)
        if given is not None:
            frames, h, w = given.shape[-3:]
            history.append(Reference.of(-(-frames // scale), -(-h // (scale * patch)), -(-w // (scale * patch))))
    mask: Any = inputs["encoder_attention_mask"]
    text = int(mask.sum()) if len(mask) == 1 else int(mask.shape[1])
    before, between = [("reference", one.count) for one in history], ("other", int(inputs["image_embeds"].shape[1]))
    sample = (*before, *extent.image, between, ("text", text))
    return replace(extent, references=tuple(history)).arranged((sample,) * samples(inputs))


def _glyphs(texts: Any) -> TextStream:
    """ByT5, which reads what stands in quotation marks; its positions hold zeros where nothing does."""
    return stream(
        "byt5", "tokenizer_2", "text_encoder_2", texts=texts, length="tokenizer_2_max_length", reads=_QUOTED
    )  # fmt: skip


def _joy(inputs: Inputs, config: Any) -> Extent:
    """Latents [B, C, frames, h, w]; or [B, items, C, frames, h, w], the last item the image, the others references,
    which follow it."""
    image = inputs["hidden_states"]
    if image.ndim == 5:
        return latents(inputs, config)
    own = latents({"hidden_states": image[:, -1]}, config)
    h, w = own.grid or (0, 0)
    return replace(own, references=(Reference.of(own.frames, h, w),) * (image.shape[1] - 1))


def _joy_plus(inputs: Inputs, config: Any) -> Arrangement:
    """Patches [B, most patches, C, 1, p, p]: those of the image come first, then references and padding; `shape_list`
    has (frames, h, w) of each picture, per sample."""
    total, text = int(inputs["hidden_states"].shape[1]), text_count(inputs, ["encoder_hidden_states"])
    extents = []
    for (frames, h, w), *others in inputs["shape_list"]:
        references = tuple(Reference.of(*size) for size in others)
        padding = total - frames * h * w - sum(one.count for one in references)
        extents.append(Extent((h, w), frames, references, padding))
    found = tuple((*extent.image, ("text", text)) for extent in extents)
    known = tuple(extent.references for extent in extents)
    return replace(extents[0].arranged(found), references=known[:1] if len(set(known)) == 1 else known)


def _ideogram4(inputs: Inputs, config: Any) -> Arrangement:
    """One sequence; `indicator` says which of its tokens are text (3) and image (2), the others are padding."""
    kinds = {2: "image", 3: "text"}
    found = []
    for row in inputs["indicator"].cpu():
        values, counts = row.unique_consecutive(return_counts=True)
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        found.append(tuple((kinds.get(value, "other"), count) for value, count in pairs))
    places = inputs["position_ids"][0][inputs["indicator"][0] == 2]
    h, w = (int(places[:, axis].max() - places[:, axis].min()) + 1 for axis in (1, 2))
    return Arrangement(tuple(found), (h, w))


def _minimax_h3(inputs: Inputs, config: Any) -> Arrangement:
    """One sequence of text, sound and video rows, placed by index; video rows at another noise level than the last one
    are conditions, and come first: every frame of them is a reference."""
    rows, texts = inputs["video_indices"].cpu(), inputs["text_indices"].tolist()
    levels = inputs["timestep_indices"].cpu()
    own = rows[levels[rows] == levels[rows[-1]]]
    ids = inputs["position_ids"].cpu()
    conditions = rows[levels[rows] != levels[rows[-1]]]
    kinds = ["other"] * len(levels)
    for kind, of in (("image", own), ("reference", conditions)):
        for row in of.tolist():
            kinds[row] = kind
    place = {row: number for number, row in enumerate(texts)}
    sample: list[Segment] = []
    for kind, run in itertools.groupby(range(len(kinds)), lambda row: "text" if row in place else kinds[row]):
        found = list(run)
        sample.append((kind, tuple(place[row] for row in found) if kind == "text" else len(found)))
    if texts == sorted(texts):
        sample = [(kind, extent if isinstance(extent, int) else len(extent)) for kind, extent in sample]
    frames, h, w = (len(axis.unique()) for axis in ids[own].T)
    grid = (h, w) if frames * h * w == len(own) else None
    references = []
    for part in ids[conditions].split(ids[conditions, 0].unique_consecutive(return_counts=True)[1].tolist()):
        sides = (len(part[:, 1].unique()), len(part[:, 2].unique()))
        references.append(Reference(len(part), sides if sides[0] * sides[1] == len(part) else None))
    return Extent(grid, frames, tuple(references)).arranged((tuple(sample),) * samples(inputs))


def _omnigen(inputs: Inputs, config: Any) -> Arrangement:
    """Padding, which no image token sees; text, in which reference images have places of their own; one token of the
    time; the image."""
    extent, length = latents(inputs, config), int(inputs["input_ids"].shape[1])
    mask: Any = inputs["attention_mask"]
    places: Any = inputs["input_image_sizes"]
    sides = (tuple(side // config.patch_size for side in one.shape[-2:]) for one in inputs["input_img_latents"] or ())
    known = {row: tuple(Reference.of(1, *next(sides)) for _ in of) for row, of in places.items()}
    found, references = [], []
    for row in range(samples(inputs)):
        inside = {p for first, last in places.get(row, ()) for p in range(first, last)}
        seen = (mask[row, -1, :length] > 0).tolist()
        kinds = [("reference" if p in inside else "text") if seen[p] else "other" for p in range(length)]
        runs = tuple((kind, len(list(of))) for kind, of in itertools.groupby(kinds))
        found.append((*runs, ("other", 1), *extent.image))
        references.append(known.get(row, ()))
    return replace(extent.arranged(found), references=tuple(references))


def _hidream(inputs: Inputs, config: Any) -> Arrangement:
    """Text is [T5, last Llama layer, this block's Llama layer]; latents that are not square are padded."""
    image, llama = inputs["hidden_states"], inputs["encoder_hidden_states_llama3"]
    text = text_count(inputs, ["encoder_hidden_states_t5"]) + 2 * int(llama[0].shape[1])
    if image.ndim == 3:
        h, w = (int(size) for size in inputs["img_sizes"][0])
        total = int(image.shape[1])
    else:
        h, w = image.shape[-2] // config.patch_size, image.shape[-1] // config.patch_size
        total = h * w if h == w else config.max_resolution[0] * config.max_resolution[1] // config.patch_size**2
    sample = (*Extent((h, w), padding=total - h * w).image, ("text", text))
    return Arrangement((sample,) * samples(inputs), (h, w))


def _z_image(inputs: Inputs, config: Any) -> Arrangement:
    """Image, then text, each filled up with learned pads to a multiple of 32 tokens, which are attended to."""
    if isinstance(inputs["x"][0], list):
        raise UserError("several texts and pictures in one sequence (ZImageOmniPipeline) are not followed")
    patch = int(inputs.get("patch_size", 2))
    found = []
    for image, text in zip(inputs["x"], inputs["cap_feats"], strict=True):
        frames, (h, w) = image.shape[1], (size // patch for size in image.shape[-2:])
        count = frames * h * w
        sample: list[Segment] = [("image", count), ("other", -count % 32)]
        found.append((*sample, ("text", tuple(range(len(text)))), ("other", -len(text) % 32)))
    return Arrangement(tuple(found), (h, w), frames)


def _krea2(inputs: Inputs, config: Any) -> Extent:
    text = int(inputs["encoder_hidden_states"].shape[1])
    return position_ids({"img_ids": inputs["position_ids"][..., text:, :]}, config)


def _stated_size(pipeline: Any) -> tuple[int, int]:
    """Where a pipeline's own arguments have the height and the width as defaults."""
    known = inspect.signature(type(pipeline).__call__).parameters
    return known["height"].default, known["width"].default


def _sample_size(pipeline: Any) -> tuple[int, int]:
    """CogVideoX: in the transformer's config, in latent cells."""
    config, side = pipeline.transformer.config, pipeline.vae_scale_factor_spatial
    return config.sample_height * side, config.sample_width * side


def _aspect_size(pipeline: Any) -> tuple[int, int]:
    """HunyuanVideo 1.5: the size of its own shape that has about as many pixels as a square of its target size."""
    width, height = pipeline.default_aspect_ratio
    return pipeline.video_processor.calculate_default_height_width(height, width, pipeline.target_size)


_UNCOND_FIRST = ("uncond", "cond")
_T5 = (stream("t5"),)
_HUNYUAN_VIDEO = (stream("llm", wrap=prompts.hunyuan_template, cut=prompts.hunyuan_cut),)
_TEXT_MASK = ("text", "mask")
_TEXTS_MASKS = ("text", "mask", "negative text", "negative mask")
_ALL_TEXTS_MASKS = ("text", "negative text", "mask", "negative mask")
_TEXTS = ("text", "negative text")

# transformer_sd3.py and pipeline_stable_diffusion_3.py. SD3.5's `attn2` sees image tokens only and does not match
# `layers`. The attention ignores any text mask: pads are keys. Without its encoder the T5 stream is zeros of the same
# length.
SD3 = Family(
    "sd3", "SD3Transformer2DModel", r"transformer_blocks\.(\d+)\.attn", ("image", "text"),
    sequence(latents, "image", "text"), pooled_input="pooled_projections", skip_input="skip_layers", timesteps=1000.0,
    guidance=_UNCOND_FIRST, length_argument=_LENGTH, default_length=256,
    streams=(
        TextStream(
            "clip", ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2"), ("prompt", "prompt_2"),
            ("negative_prompt", "negative_prompt_2"), length="tokenizer",
        ),
        stream("t5", "tokenizer_3", "text_encoder_3"),
    ),
    encoded=("text", "negative text", "pooled", "negative pooled"), pipelines=("StableDiffusion3Pipeline",),
)  # fmt: skip

ENTRIES: tuple[Family, ...] = (
    SD3,
    # transformer_flux.py. CLIP is pooled only: no text position carries it. Single blocks see one joined sequence.
    Family(
        "flux", "FluxTransformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(position_ids, "text", "image"),
        pooled_input="pooled_projections", length_argument=_LENGTH, default_length=512,
        streams=(stream("t5", "tokenizer_2", "text_encoder_2", texts=prompts.inverted("tokenizer_2")),),
        encoded=("text", "pooled", "text ids"),
        pipelines=("FluxPipeline", "FluxKontextPipeline"), cell=2, form="packed", distilled=True,
    ),
    # transformer_flux2.py, without its key-value cache.
    Family(
        "flux2", "Flux2Transformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(_flux2, "text", "image"),
        streams=(stream("llm", wrap=prompts.flux2_chat, texts=prompts.flux2_pieces),),
        length_argument=_LENGTH, default_length=512, encoded=("text", "text ids"),
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"), cell=2, form="packed", distilled=True,
    ),
    # transformer_flux3.py. Blocks of one modality come first and are no joint attention.
    Family(
        "flux3", "Flux3Transformer2DModel", _SINGLE, ("text", "image"), sequence(_flux3, "text", "image"),
        not_loaded="diffusers has modular blocks for it, and no pipeline",
    ),
    # transformer_chroma.py. The mask is an outer product: masked rows see nothing.
    Family(
        "chroma", "ChromaTransformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(position_ids, "text", "image"), length_argument=_LENGTH, default_length=512,
        streams=(stream("t5", texts=prompts.inverted("tokenizer")),),
        encoded=("text", "text ids", "mask", "negative text", "negative text ids", "negative mask"),
        pipelines=("ChromaPipeline",), cell=2, form="packed",
    ),
    Family(
        "bria", "BriaTransformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(position_ids, "text", "image"), timesteps=1000.0, guidance=_UNCOND_FIRST, streams=_T5,
        length_argument=_LENGTH, default_length=128, encoded=("text", "negative text", "text ids"),
        pipelines=("BriaPipeline",), cell=2, form="packed", scale_of_tokens=True,
    ),
    # transformer_bria_fibo.py. Half of the text channels are replaced at each block.
    Family(
        "bria_fibo", "BriaFiboTransformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(position_ids, "text", "image"), timesteps=1000.0, guidance=_UNCOND_FIRST,
        streams=(stream("llm", padded=False, together=True, blank="bos"),), length_argument=_LENGTH,
        default_length=3000,
        encoded=("text", "negative text", "text ids", "mask", "negative mask", "layers", "negative layers"),
        pipelines=("BriaFiboPipeline",), cell=1, form="packed",
    ),
    Family(
        "longcat_image", "LongCatImageTransformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(position_ids, "text", "image"), encoded=("text", "text ids"),
        streams=(stream("llm", texts=prompts.longcat_pieces, length="tokenizer_max_length", special_tokens=False),),
        pipelines=("LongCatImagePipeline",), options=(("enable_prompt_rewrite", False),), cell=2, form="packed",
    ),
    Family(
        "ovis_image", "OvisImageTransformer2DModel", (_DOUBLE, _SINGLE), ("text", "image"),
        sequence(position_ids, "text", "image"), length_argument=_LENGTH, default_length=256,
        streams=(
            stream(
                "llm", wrap=chat("system_prompt", add_generation_prompt=True, enable_thinking=False),
                cut=attribute("user_prompt_begin_id"), special_tokens=False,
            ),
        ),
        encoded=("text", "negative text", "text ids", "negative text ids"), pipelines=("OvisImagePipeline",),
        cell=2, form="packed",
    ),
    # auraflow_transformer_2d.py. Eight learned registers come before the text.
    Family(
        "aura_flow", "AuraFlowTransformer2DModel", (r"joint_transformer_blocks\.(\d+)\.attn", _SINGLE),
        ("other", "text", "image"), sequence(latents, "other", "text", "image", registers=8),
        guidance=_UNCOND_FIRST, streams=_T5, length_argument=_LENGTH, default_length=256, encoded=_TEXTS_MASKS,
        pipelines=("AuraFlowPipeline",),
    ),
    # transformer_qwenimage.py. `encoder_hidden_states_mask` hides keys.
    Family(
        "qwen_image", "QwenImageTransformer2DModel", _DOUBLE, ("text", "image"),
        sequence(image_shapes, "text", "image"),
        streams=(
            stream(
                "llm", wrap=template("prompt_template_encode"), cut=attribute("prompt_template_encode_start_idx"),
                padded=False, picture="<|image_pad|>", pictures=prompts.numbered_pictures,
            ),
        ),
        length_argument=_LENGTH, default_length=512, encoded=_TEXT_MASK,
        pipelines=("QwenImagePipeline", *_QWEN_EDIT), editing=_QWEN_EDIT,
        scale_argument="true_cfg_scale", cell=2, form="packed",
    ),
    # cogvideox_transformer_3d.py and consisid_transformer_3d.py: latents [B, frames, C, h, w].
    Family(
        "cogvideox", "CogVideoXTransformer3DModel", _BLOCKS, ("text", "image"), sequence(frames_first, "text", "image"),
        timesteps=1000.0, guidance=_UNCOND_FIRST, streams=_T5, length_argument=_LENGTH,
        default_length=226, encoded=_TEXTS,
        pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"), video_size=_sample_size,
    ),
    Family(
        "consisid", "ConsisIDTransformer3DModel", _BLOCKS, ("text", "image"), sequence(frames_first, "text", "image"),
        timesteps=1000.0, guidance=_UNCOND_FIRST, streams=_T5, length_argument=_LENGTH,
        default_length=226, encoded=_TEXTS,
        not_loaded="its pipeline wants embeddings of a face beside the picture",
    ),
    Family(
        "cogview3plus", "CogView3PlusTransformer2DModel", _BLOCKS, ("text", "image"),
        sequence(latents, "text", "image"), timesteps=1000.0, guidance=_UNCOND_FIRST,
        streams=_T5, length_argument=_LENGTH, default_length=224, encoded=_TEXTS, pipelines=("CogView3PlusPipeline",),
    ),
    # transformer_cogview4.py and transformer_glm_image.py. Their float mask adds 1 to kept keys and hides none.
    Family(
        "cogview4", "CogView4Transformer2DModel", _BLOCKS, ("text", "image"), sequence(latents, "text", "image"),
        timesteps=1000.0, streams=(stream("llm", padded=False, together=True, multiple=16, side="left"),),
        length_argument=_LENGTH, default_length=1024, encoded=_TEXTS, pipelines=("CogView4Pipeline",),
    ),
    Family(
        "glm_image", "GlmImageTransformer2DModel", _BLOCKS, ("text", "image"), sequence(_glm, "text", "image"),
        timesteps=1000.0, encoded=_TEXTS, length_argument=_LENGTH, default_length=2048,
        streams=(
            stream("byt5", texts=prompts.glm_glyphs, padded=False, together=True, side="left", reads=_QUOTED),
        ),
        pipelines=("GlmImagePipeline",),
    ),
    # transformer_hunyuan_video.py. The token refiner is text self-attention and does not match `layers`.
    Family(
        "hunyuan_video", "HunyuanVideoTransformer3DModel", (_DOUBLE, _SINGLE), ("image", "text"),
        sequence(latents, "image", "text"), timesteps=1000.0, streams=_HUNYUAN_VIDEO, length_argument=_LENGTH,
        default_length=256, encoded=("text", "pooled", "mask"), pipelines=("HunyuanVideoPipeline",), distilled=True,
        template_arguments=("prompt_template",), video_size=_stated_size,
    ),
    # transformer_hunyuan_video_framepack.py: picture embeddings are neither image nor text nor latents.
    Family(
        "hunyuan_video_framepack", "HunyuanVideoFramepackTransformer3DModel", (_DOUBLE, _SINGLE),
        ("reference", "image", "other", "text"), _framepack, timesteps=1000.0, streams=_HUNYUAN_VIDEO,
        length_argument=_LENGTH, default_length=256, encoded=("text", "pooled", "mask"),
        template_arguments=("prompt_template",),
        not_loaded="its pipeline makes a video section by section, each with all sampling steps",
    ),
    # transformer_hunyuanimage.py: text is [ByT5, language model].
    Family(
        "hunyuan_image", "HunyuanImageTransformer2DModel", (_DOUBLE, _SINGLE), ("image", "text"), _reordered("_2", ""),
        timesteps=1000.0, encoded=("text", "mask", "glyphs", "glyph mask"),
        streams=(
            _glyphs(prompts.hunyuan_image_glyphs),
            stream(
                "llm", wrap=template("prompt_template_encode"), cut=attribute("prompt_template_encode_start_idx"),
                length="tokenizer_max_length",
            ),
        ),
        pipelines=("HunyuanImagePipeline",), scale_argument="distilled_guidance_scale", distilled=True, cell=1,
    ),
    # transformer_hunyuan_video15.py: the same, and picture embeddings, which are neither image nor text tokens.
    Family(
        "hunyuan_video15", "HunyuanVideo15Transformer3DModel", _DOUBLE, ("image", "other", "text"),
        _reordered("_2", ""), timesteps=1000.0, encoded=("text", "mask", "glyphs", "glyph mask"),
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"), video_size=_aspect_size,
        streams=(
            _glyphs(prompts.hunyuan_video15_glyphs),
            stream(
                "llm", wrap=chat(system=lambda pipeline: pipeline.system_message, add_generation_prompt=True),
                texts=prompts.spoken, cut=attribute("prompt_template_encode_start_idx"), length="tokenizer_max_length",
                special_tokens=False,
            ),
        ),
    ),
    # transformer_mochi.py: one attention call per sample, over its valid text. Its schedule counts from noise, 0.
    Family(
        "mochi", "MochiTransformer3DModel", _BLOCKS, ("image", "text"), packed(latents, "image", "text"),
        timesteps=1000.0, clean_timestep=1000.0, towards_image=True, pipelines=("MochiPipeline",),
        video_size=lambda pipeline: (pipeline.default_height, pipeline.default_width),
        guidance=_UNCOND_FIRST, streams=_T5, length_argument=_LENGTH, default_length=256,
        encoded=_TEXTS_MASKS,
    ),
    Family(
        "hidream", "HiDreamImageTransformer2DModel",
        (r"double_stream_blocks\.(\d+)\.block\.attn1", r"single_stream_blocks\.(\d+)\.block\.attn1"), ("image", "text"),
        _hidream, text_input="encoder_hidden_states_t5", timestep_input="timesteps", timesteps=1000.0,
        towards_image=True, guidance=_UNCOND_FIRST, length_argument=_LENGTH, default_length=128,
        streams=(
            stream("t5", "tokenizer_3", "text_encoder_3", limited=True),
            stream("llama", "tokenizer_4", "text_encoder_4", limited=True),
            stream("llama_layer", "tokenizer_4", "text_encoder_4", limited=True),
        ),
        encoded=(*_TEXTS, "llama", "negative llama", "pooled", "negative pooled"), pipelines=("HiDreamImagePipeline",),
    ),
    # transformer_lumina2.py: valid text, then image, packed per sample.
    Family(
        "lumina2", "Lumina2Transformer2DModel", r"layers\.(\d+)\.attn", ("text", "image"),
        packed(latents, "text", "image"), clean_timestep=1.0, towards_image=True,
        streams=(stream("llm", wrap=prompts.lumina2_system),), length_argument=_LENGTH, default_length=256,
        encoded=_TEXTS_MASKS,
        pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        template_arguments=("system_prompt",),
    ),
    # transformer_z_image.py, text to image: lists of a latent [C, frames, h, w] and a text [T, width] per sample.
    Family(
        "z_image", "ZImageTransformer2DModel", r"layers\.(\d+)\.attention", ("image", "other", "text", "other"),
        _z_image, image_input="x", text_input="cap_feats", timestep_input="t", clean_timestep=1.0, towards_image=True,
        guidance=("cond", "uncond"), length_argument=_LENGTH, default_length=512, encoded=_TEXTS,
        streams=(stream("llm", wrap=chat(add_generation_prompt=True, enable_thinking=True), padded=False),),
        pipelines=("ZImagePipeline",), cell=2, form="listed", scale_offset=1.0,
    ),
    # transformer_krea2.py: text [B, T, language model layers, width].
    Family(
        "krea2", "Krea2Transformer2DModel", _DOUBLE, ("text", "image"),
        sequence(_krea2, "text", "image"), encoded=_TEXT_MASK,
        streams=(
            stream(
                "llm", wrap=prompts.krea2_prefix, cut=attribute("prompt_template_encode_start_idx"),
                tail=prompts.krea2_suffix,
            ),
        ),
        length_argument=_LENGTH, default_length=512, pipelines=("Krea2Pipeline",), cell=2, form="packed",
        scale_offset=1.0,
    ),
    Family(
        "ernie_image", "ErnieImageTransformer2DModel", r"layers\.(\d+)\.self_attention", ("image", "text"),
        sequence(latents, "image", "text", text=("text_bth",)), text_input="text_bth", timesteps=1000.0,
        guidance=_UNCOND_FIRST, encoded=("text",),
        streams=(stream("llm", length="tokenizer", padded=False, blank="bos"),),
        pipelines=("ErnieImagePipeline",), options=(("use_pe", False),),
    ),
    # transformer_ideogram4.py: padding, text and image in one sequence; padding attends to padding.
    Family(
        "ideogram4", "Ideogram4Transformer2DModel", r"layers\.(\d+)\.attention", ("other", "text", "image"), _ideogram4,
        clean_timestep=1.0, towards_image=True, encoded=("text", "position ids", "segment ids", "indicator"),
        streams=(
            stream("llm", wrap=chat(listed=True, add_generation_prompt=True), padded=False, special_tokens=False),
        ),
        length_argument=_LENGTH, default_length=2048, pipelines=("Ideogram4Pipeline",),
        options=(("guidance_schedule", None),), cell=2, form="joined",
    ),
    # transformer_omnigen.py: text comes as ids and attends to what precedes it; one token holds the time.
    Family(
        "omnigen", "OmniGenTransformer2DModel", r"layers\.(\d+)\.self_attn", ("text", "other", "image"), _omnigen,
        text_input="input_ids", clean_timestep=1.0, towards_image=True,
        not_loaded="its text goes into the transformer as token ids, pictures between them, with the rows of guidance"
        " in every call: no step of the pipeline encodes a prompt whose words could be followed",
    ),
    # transformer_minimax_h3.py: text, sound and video in one sequence, without a mask. Its timesteps are those that
    # occur in the sequence, in rising order: the first is the noisiest rows'.
    Family(
        "minimax_h3", "MiniMaxH3Transformer3DModel", r"transformer_blocks\.(\d+)\.attn", ("text", "other", "image"),
        _minimax_h3, clean_timestep=1.0, towards_image=True,
        not_loaded="diffusers has modular blocks for it, and no pipeline",
    ),
    Family(
        "easyanimate", "EasyAnimateTransformer3DModel", _BLOCKS, ("text", "image"),
        sequence(latents, "text", "image", text=("encoder_hidden_states", "encoder_hidden_states_t5")),
        timesteps=1000.0, guidance=_UNCOND_FIRST, encoded=_ALL_TEXTS_MASKS,
        streams=(stream("llm", wrap=chat(listed=True, add_generation_prompt=True), side="right"),),
        length_argument=_LENGTH, default_length=256, pipelines=("EasyAnimatePipeline",), video_size=_stated_size,
    ),
    Family(
        "joyimage_edit", "JoyImageEditTransformer3DModel", r"double_blocks\.(\d+)\.attn", ("image", "text"),
        sequence(_joy, "image", "text"), timesteps=1000.0, encoded=_TEXT_MASK,
        streams=(
            stream(
                "llm", wrap=template("prompt_template_encode", "image"), padded=False,
                cut=attribute("prompt_template_encode_start_idx", "image"),
            ),
        ),
        length_argument=_LENGTH, default_length=1024, template_arguments=("template_type",), not_loaded=_JOY,
    ),
    # transformer_joyimage_edit_plus.py: its text holds the references, as a vision-language model reads them.
    Family(
        "joyimage_edit_plus", "JoyImageEditPlusTransformer3DModel", r"double_blocks\.(\d+)\.attn", ("image", "text"),
        _joy_plus, timesteps=1000.0, guidance=_UNCOND_FIRST, not_loaded=_JOY,
    ),
    # transformer_motif_video.py: embeddings of a first frame are neither image nor text tokens. Its decoder attends
    # from the image to what the layers before made of it, and its blocks may read text by cross-attention, too.
    Family(
        "motif_video", "MotifVideoTransformer3DModel", (_DOUBLE, _SINGLE), ("image", "other", "text"),
        sequence(latents, "image", "other", "text", registers="image_embeds"), textless="num_decoder_layers",
        timesteps=1000.0, streams=_T5, length_argument=_LENGTH,
        default_length=512, encoded=_ALL_TEXTS_MASKS, pipelines=("MotifVideoPipeline",), video_size=_stated_size,
    ),
    # transformer_prx.py and transformer_nucleusmoe_image.py: text tokens are keys only, so there is no T2I and no T2T.
    Family(
        "prx", "PRXTransformer2DModel", r"blocks\.(\d+)\.attention", ("text", "image"),
        sequence(latents, "text", "image", queries=("image",)), guidance=_UNCOND_FIRST, encoded=_TEXTS_MASKS,
        streams=(stream("t5", texts=prompts.prx_cleaned, length="tokenizer_max_length"),),
        length_argument="tokenizer_max_length", pipelines=("PRXPipeline",),
        options=(("use_resolution_binning", False),), size_in_pixels=True,
        template_arguments=("skip_text_cleaning",),
    ),
    Family(
        "nucleus_image", "NucleusMoEImageTransformer2DModel", _DOUBLE, ("image", "text"),
        sequence(image_shapes, "image", "text", queries=("image",)), encoded=_TEXT_MASK,
        streams=(
            stream(
                "llm", "processor", padded=False, together=True, multiple=8,
                wrap=chat(
                    system=prompts.nucleus_system, listed=True, component="processor", add_generation_prompt=True
                ),
            ),
        ),
        length_argument=_LENGTH, default_length=1024, pipelines=("NucleusMoEImagePipeline",), cell=2, form="packed",
        towards_image=True,
    ),
)  # fmt: skip
