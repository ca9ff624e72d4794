"""The registry of model families: the entry of a transformer, or why there is none. A transformer without an entry is
laid out mechanically (`models.discover_layout`).

    >>> FAMILIES["sd3"].order
    ('image', 'text')
"""

from __future__ import annotations

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.entries import ENTRIES
from mmdit_probe.models.families.facts import Family as Family, TextStream as TextStream

FAMILIES: dict[str, Family] = {entry.name: entry for entry in ENTRIES}
BY_CLASS: dict[str, Family] = {entry.transformer: entry for entry in ENTRIES}

CROSS_ATTENTION: dict[str, str] = dict.fromkeys(
    (
        "PixArtTransformer2DModel", "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel",
        "WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel", "Kandinsky5Transformer3DModel", "CosmosTransformer3DModel",
        "Kandinsky6Transformer3DModel", "HeliosTransformer3DModel", "AnyFlowTransformer3DModel",
        "AnyFlowFARTransformer3DModel", "DreamLiteTransformer2DModel",
        "AllegroTransformer3DModel", "LatteTransformer3DModel", "HunyuanDiT2DModel", "LuminaNextDiT2DModel",
        "WanAnimate2Transformer3DModel", "SanaWMLTX2RefinerTransformer3DModel",
    ),
    "image tokens attend to each other and to the text in separate softmaxes, so they never compete for one mass",
) | dict.fromkeys(
    ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
    "its self-attention is linear, without a softmax, and the text is read by cross-attention",
) | {
    "SanaWMTransformer3DModel": "image tokens attend to each other only, mostly by linear attention without a softmax,"
    " and the text is read by cross-attention",
    "BriaFibo2Transformer2DModel": "the image shares its softmax with gist tokens, which a perceiver makes of the text,"
    " and reads the text itself in separate softmaxes, so no key is a word's",
}  # fmt: skip
"""Transformers that are no MM-DiT, and why."""

SEVERAL_CALLS: dict[str, str] = {
    "QwenImage21Transformer2DModel": "text and each picture attend in calls of their own, causally, and later steps"
    " take the text's keys from a cache",
    "Cosmos3OmniTransformer": "text attends in a call of its own, causally, before the pictures, sounds and actions do",
}
"""Transformers whose layers make several attention calls, so that no call has all queries, and which calls."""


def family_of(transformer: object) -> Family:
    """The family of a diffusers transformer, by its class or a base class.

    Raises:
        UserError: not a known MM-DiT.
    """
    found = find_family(transformer)
    if found is None:
        raise UserError(
            f"{type(transformer).__name__} is not a known MM-DiT: image and text tokens must share one softmax. Known"
            f" transformers: {', '.join(BY_CLASS)}"
        )
    return found


def find_family(transformer: object) -> Family | None:
    """The same; None for one without an entry that may be an MM-DiT.

    Raises:
        UserError: it is known to be none, or one that is not followed.
    """
    names = [base.__name__ for base in type(transformer).__mro__]
    for name in names:
        if name in BY_CLASS:
            return BY_CLASS[name]
    refuse_class(*names)
    return None


def refuse_class(*names: str) -> None:
    """Refuse the names of a transformer's class and its bases.

    Raises:
        UserError: one of them has no joint attention, or one that is not followed.
    """
    for name in names:
        if name in SEVERAL_CALLS:
            raise UserError(
                f"{name} cannot be probed: its layers make several attention calls ({SEVERAL_CALLS[name]}), and a probe"
                " looks at one call with all of a layer's queries"
            )
        if name in CROSS_ATTENTION:
            raise UserError(
                f"{name} is not an MM-DiT: {CROSS_ATTENTION[name]}. There is no joint attention to probe; see"
                " `mmdit-probe models` for the families that have it"
            )
