"""capture: one picture, a few noised forwards, everything that methods read.

    found = capture(model, picture, parse_classes("ring, house, grass"), Reading(layers=(2, 3)), keep=("i2t", "i2i"))

One stock forward (arXiv:2509.18096 section 3.4: encode, noise to sigma, one conditional call) per prompt, noise level
and seed; there is one prompt unless the names overflow the text encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT, TextCondition
from mmdit_probe.observe.concepts import ConceptStream
from mmdit_probe.observe.maps import PARTS, JointBlocks, second_attention
from mmdit_probe.observe.observer import Observer
from mmdit_probe.observe.probe import probe
from mmdit_probe.segment.record import Capture, JointRecord, Pass, Reading, average, head_mean, with_columns
from mmdit_probe.segment.vocabulary import Prompt, pack
from mmdit_probe.specs import Spec, layer_indices

DEFAULT = Reading()
"""Middle layers at the paper's noise level."""


def middle_layers(count: int) -> tuple[int, ...]:
    """The middle third of the layers: where the layers that ground words lie in the models looked at so far."""
    return tuple(range(count // 3, max(count // 3 + 1, (2 * count) // 3)))


def capture(
    model: MMDiT,
    image: NDArray[np.uint8],
    classes: Sequence[SegClass],
    reading: Reading = DEFAULT,
    *,
    keep: Iterable[str] = ("i2t",),
    together: bool = True,
    heads_apart: bool = True,
    text_kinds: Collection[str] | None = None,
    concept_stream: str | None = None,
    encode: Callable[[str], TextCondition] | None = None,
) -> Capture:
    """Run the model on one picture and keep what methods need.

    Args:
        model: the model.
        image: uint8 [height, width, 3], any size.
        classes: what to name in the prompt; none for the empty prompt.
        reading: layers, heads, noise levels and seeds, and how the picture is fitted.
        keep: parts of `JointRecord` ("concepts" runs a concept stream of the class names beside the forward).
        together: names share a prompt where they fit; False gives every name its own.
        heads_apart: keep I2T of every head; False keeps the mean over heads where one prompt holds all names (what
            methods read unless `Method.reads_heads`): [1, I, T].
        text_kinds: span kinds whose text columns are kept one by one, the others as their sum; None keeps all.
        concept_stream: text encoder stream that concept vectors are read from; see `concept_embeddings`.
        encode: prompt -> its encoding, in place of the model's, e.g. one that remembers.
    """
    count = len(model.layers)
    layers = layer_indices(middle_layers(count) if reading.layers is None else reading.layers, count)
    size = reading.size or model.default_size
    fit = Fit.of(image.shape[:2], size, model.size_multiple, reading.fit, most_tokens(model))  # type: ignore[arg-type]
    parts = tuple(dict.fromkeys(keep))
    prompts = pack(classes, lambda text: model.token_tables(text)[0], together) if classes else []
    if not prompts:
        if "concepts" in parts:
            raise UserError("conceptattention needs class names")
        prompts = [Prompt("", model.token_tables("")[0], ())]
    shown = fit.apply(image)
    if reading.reference != "none":
        if reading.reference == "read" and {"concepts", "i2i_attn2"} & {*parts}:
            raise UserError("concepts and a second attention have no tokens of a reference; read the picture itself")
        model, encode = model.given([shown]), None  # an encoder may be shown the reference
    latents = model.encode_image(shown)
    names = [query.text for prompt in prompts for query in prompt.queries]
    concepts = concept_embeddings(model, names, concept_stream) if "concepts" in parts else None
    passes = []
    for number, prompt in enumerate(prompts):
        text = (encode or model.encode_prompt)(prompt.text)
        samples: dict[int, list[JointRecord]] = {layer: [] for layer in layers}
        for sigma, seed in product(reading.sigmas, reading.seeds):
            noised = model.noise(latents, sigma, seed)
            beside = concepts if number == 0 else None
            records, grid = _forward(model, noised, sigma, text, layers, parts, reading, beside)
            for layer, record in records.items():
                samples[layer].append(record if heads_apart or len(prompts) > 1 else head_mean(record))
        whole = Pass(prompt, {layer: average(records) for layer, records in samples.items()})
        passes.append(whole if text_kinds is None else with_columns(whole, text_kinds))
    return Capture(
        image, fit, grid, list(classes), passes, tuple(reading.sigmas), tuple(reading.seeds), layers,
        layer_weights(layers, reading.weights), family=model.family.name,
    )  # fmt: skip


def most_tokens(model: MMDiT) -> int | None:
    """Tokens along a side that the transformer has positions for; None where positions are computed (RoPE)."""
    most = getattr(model.transformer.config, "pos_embed_max_size", None)
    return None if most is None else int(most)


def layer_weights(layers: Sequence[int], weights: Mapping[int, float] | None) -> tuple[float, ...]:
    """Weights in the order of `layers`, summing to 1; () for equal ones.

    Raises:
        UserError: a layer has no weight, or all weights are 0.
    """
    if weights is None:
        return ()
    lost = [layer for layer in layers if layer not in weights]
    total = sum(weights.get(layer, 0.0) for layer in layers)
    if lost or not total > 0:
        raise UserError(f"weights {dict(weights)}: expected one for each of the layers {list(layers)}, not all 0")
    return tuple(weights[layer] / total for layer in layers)


def concept_embeddings(model: MMDiT, names: Sequence[str], stream: str | None = None) -> torch.Tensor:
    """One vector [K, C] per name: each name encoded alone, mean over its word tokens.

    Args:
        stream: text encoder stream to read; the last one that has words if None (SD3: T5 where it is on, else CLIP).
            Means over several streams would mix channels that belong to different encoders.
    """
    text = model.encode_prompt(list(names))
    vectors = []
    for row, table in zip(text.prompt_embeds, text.tokens, strict=True):
        streams = [token.stream for token in table.tokens if token.kind == "word"]
        if not streams:
            raise UserError(f"class name {table.prompt!r} has no word tokens")
        vectors.append(row[table.positions("word", stream or streams[-1])].mean(0))
    return torch.stack(vectors)


def _forward(
    model: MMDiT, noised: torch.Tensor, sigma: float, text: TextCondition, layers: Sequence[int],
    parts: Sequence[str], reading: Reading, concepts: torch.Tensor | None,
) -> tuple[dict[int, JointRecord], tuple[int, int]]:  # fmt: skip
    """What is kept by layer, and the grid of its tokens."""
    reference = 0 if reading.reference == "read" else None
    blocks = JointBlocks(layers, [part for part in parts if part in PARTS], reading.heads, reference)
    observers: list[Observer] = [blocks]
    stream = ConceptStream(model, concepts) if concepts is not None else None
    watched: Spec = list(layers)
    with ExitStack() as stack:
        second = stack.enter_context(second_attention(model, layers)) if "i2i_attn2" in parts else {}
        if stream is not None:
            observers.append(stream)
            watched = list(range(max(layers) + 1))
            stack.enter_context(stream.listening())
        stack.enter_context(torch.no_grad())
        stack.enter_context(probe(model, *observers, layers=watched))
        model.denoise(noised, sigma, text)
    assert blocks.grid is not None
    return {
        layer: JointRecord(
            layer,
            **{name: value[0] for name, value in blocks.kept[layer].items()},
            concepts=stream.outputs[layer][0] if stream is not None else None,
            i2i_attn2=second[layer][0] if second else None,
        )
        for layer in layers
    }, blocks.grid
