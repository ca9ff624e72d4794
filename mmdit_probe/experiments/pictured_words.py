"""Pictures of prompts, or photos with a text, and the words that are looked for in them: what maps and explore have in
common. Not here: what is kept of them (`experiments.word_maps`, `experiments.explore`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmdit_probe.data.prompt_sets import SETS
from mmdit_probe.data.sources import NAMES
from mmdit_probe.data.words import check_prompt, find, folded, words
from mmdit_probe.errors import UserError, unknown
from mmdit_probe.experiments.experiment import Experiment, Study, request_of, scheduled
from mmdit_probe.experiments.known import KnownLayers, grounding_layers
from mmdit_probe.experiments.options import (
    SAMPLED,
    Input,
    Referring,
    Sampling,
    captions_of,
    check_streams,
    notes_on,
    prompts_of,
    samples_of,
    streams_of,
)
from mmdit_probe.experiments.token_rows import Item, unread
from mmdit_probe.options import Option, changed
from mmdit_probe.specs import Spec, layer_indices, listed

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmdit_probe.data import Sample
    from mmdit_probe.models.mmdit import MMDiT
    from mmdit_probe.models.tokens import TokenTable
    from mmdit_probe.observe.observer import Observer
    from mmdit_probe.results.clip import Clip

MOST_PIXELS = 1 << 14
"""Of a side: more than any model makes."""

Side = Annotated[
    int | None, Option("Of the picture in pixels; the model's own if None.", min=1, max=MOST_PIXELS, command=False)
]


@dataclass(frozen=True)
class PicturedPrompt(Item):
    """One picture to make, or at hand, the words that are looked for in it, and pictures without any that go along."""

    words: tuple[str, ...] = ()
    beside: tuple[PicturedPrompt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pictures(Sampling, Referring, Experiment):
    """Pictures of prompts, or photos with a text, and words of them: what maps and explore have in common."""

    prompt: Annotated[
        str | Sequence[str] | None,
        Input("What to draw, or the text of --images; also a file of prompts or a set.", argument=True, values=SETS),
    ] = None
    words: Annotated[
        str | Sequence[str] | None, Input("Words or phrases of the prompt, by comma.", shown_default="all of them")
    ] = None
    images: Annotated[
        Any,
        Input("Photos to read instead of drawing: a file, a folder, or scenes:val:3.", also=("--image",), values=NAMES),
    ] = None
    limit: Annotated[int | None, Input("Use the first LIMIT prompts or pictures.", min=1, shown_default="all")] = None
    images_per_prompt: Annotated[int, Input("Pictures per prompt, each with a seed of its own.", min=1)] = 1
    height: Side = None
    width: Side = None
    streams: Annotated[
        str | None, Option("Text tokens of these encoders only, e.g. clip.", also=("--stream",), shown_default="all")
    ] = None
    sigma: Annotated[
        float, Option("Noise level of --images, 0 clean to 1 noise (the paper's t=8: 0.515).", min=0, max=1)
    ] = 0.515

    def __post_init__(self) -> None:
        super().__post_init__()
        unread = (
            changed(self, "sigma") if self.images is None else changed(self, "images_per_prompt", "steps", *SAMPLED)
        )
        if unread:
            raise UserError(
                f"{unread} is of photos (--images); what is drawn has --steps" if self.images is None
                else f"{unread} is of pictures that are drawn; with --images leave it out"
            )  # fmt: skip

    def gather(self, scenes: bool) -> tuple[list[str], list[Sample]]:
        if self.prompt is None and self.images is None:
            raise UserError('no prompt is given; expected one, such as "a red ring and a blue house on grass"')
        if self.images is None:
            texts = prompts_of(self.prompt, self.limit, scenes, 1)
            self._check_words(texts)
            return texts, []
        given = isinstance(self.images, str | Path | list | tuple)
        pictures = samples_of(self.images if given else [self.images], self.limit)
        texts = captions_of(self.prompt, pictures)
        missing = next((one.name for one, text in zip(pictures, texts, strict=True) if not text), None)
        if missing is not None:
            raise UserError(f"picture {missing!r} has no caption: give the text whose words are looked for in it")
        self._check_words(texts)
        return texts, pictures

    def _check_words(self, texts: Sequence[str]) -> None:
        """There is a word to look for, before a tokenizer says which tokens stand for it.

        Raises:
            UserError: no prompt has a word, none is named, one is in no prompt, or a prompt is too long to be read.
        """
        for text in texts:
            check_prompt(text)
        known = dict.fromkeys(text[start:stop] for text in texts for start, stop in words(text))
        if self.words is None and not any(any(map(str.isalnum, word)) for word in known):
            raise UserError(f"prompt {texts[0]!r} has no word to look for")
        asked = self.named_words()
        if asked == []:
            raise UserError(f"--words {self.words!r} names no word; expected words of the prompt, by comma")
        for word in asked or ():
            if not any(find(word, text, whole=False) for text in texts):
                raise unknown("word", word, known)

    def named_words(self) -> list[str] | None:
        """The words that are asked for; None: all of them."""
        return None if self.words is None else [word for word in listed(self.words) if word]

    def items(self, model: MMDiT, inputs: tuple[list[str], list[Sample]]) -> list[PicturedPrompt]:
        """What is to be looked at, each with the words that its prompt has.

        Raises:
            UserError: a word that no prompt has, or no prompt with any.
        """
        texts, pictures = inputs
        tables = model.token_tables(texts)
        check_streams(model, self.streams)
        asked = self.named_words()
        for word in asked or ():
            if not any(table.word_spans(word, missing_ok=True) for table in tables):
                tables[0].word_spans(word)  # says why
        chosen = [words_of(table, asked, streams_of(self.streams)) for table in tables]
        if not any(chosen):
            what = f"prompt {texts[0]!r} has none of the words asked for, or no word at all"
            parts = [f"{stream.name} reads only {stream.reads}" for stream in model.family.streams if stream.reads]
            every = len(parts) == len(model.family.streams) > 0
            raise UserError(f"{what}: {' and '.join(parts)}" if every else what)
        count = 1 if pictures else self.images_per_prompt
        return [
            PicturedPrompt(k, texts[of], self.seed + k, pictures[of] if pictures else None, chosen[of])
            for k, of in enumerate(of for of in range(len(texts)) for _ in range(count))
        ]

    def prepare(self, model: MMDiT, inputs: tuple[list[str], list[Sample]]) -> Study:
        items = self.items(model, inputs)
        size = self.size(model)
        notes = model.notes_on_words(inputs[0])
        notes += [line for table in model.token_tables(inputs[0]) for line in unread(table)]
        bare = dict.fromkeys(item.prompt for item in items if not item.words)
        notes += [f"prompt {prompt!r} has none of the words asked for: it has no maps" for prompt in bare]
        notes += notes_on(model, inputs[1], size=size)
        how: dict[str, Any] = {"streams": streams_of(self.streams), "height": self.height, "width": self.width}
        how |= {"sigma": self.sigma} if inputs[1] else {"num_steps": self.num_steps, "guidance": self.guidance}
        request = request_of(
            model,
            items=[
                [item.prompt, item.seed, list(item.words), *([item.picture.fingerprint()] if item.picture else [])]
                for item in items
            ],
            **how,
            **self.places(model),
        )
        facts: dict[str, Any] = {"remarks": notes}
        facts |= {"sigmas": [self.sigma]} if inputs[1] else scheduled(model, self.num_steps)
        return Study(model, request, _with_words(items), "pictures", facts=facts, notes=notes)

    def places(self, model: MMDiT) -> dict[str, Any]:
        """Layers, steps and heads that are looked at, for the request."""
        raise NotImplementedError

    def size(self, model: MMDiT) -> tuple[int, int]:
        """(height, width) of the pictures in pixels.

        Raises:
            UserError: sides that were asked for are no whole tokens, or more than the model has positions for.
        """
        from mmdit_probe.data.fit import check_size
        from mmdit_probe.segment.capture import most_tokens

        height, width = model.default_size
        size = self.height or height, self.width or width
        if size != (height, width):
            check_size(size, model.size_multiple, most_tokens(model))
        return size

    def look(
        self, model: MMDiT, item: PicturedPrompt, observers: Sequence[Observer], layers: Spec, steps: Spec = "all"
    ) -> Image | Clip:
        """Make the picture or the video, or read a picture, while observers look."""
        from mmdit_probe.observe.probe import probe

        height, width = self.size(model)
        if item.picture is None:
            with probe(model, *observers, layers=layers, steps=steps):
                found: Image | Clip = model.generate(
                    item.prompt, steps=self.num_steps, guidance=self.guidance, seed=item.seed, height=height,
                    width=width,
                )[0]  # fmt: skip
            return found
        picture = item.picture.open((height, width))
        latents = model.noise(model.encode_image(picture), self.sigma, item.seed)
        with probe(model, *observers, layers=layers):
            model.denoise(latents, self.sigma, model.encode_prompt([item.prompt]), seeds=item.seed)
        return picture


def _with_words(items: Sequence[PicturedPrompt]) -> list[PicturedPrompt]:
    """The items that have words, which make up the tables; the first of them has the others beside it."""
    bare = tuple(item for item in items if not item.words)
    first, *others = (item for item in items if item.words)
    return [replace(first, beside=bare), *others]


def words_of(table: TokenTable, asked: Sequence[str] | None, streams: Collection[str] | None = None) -> tuple[str, ...]:
    """The words of a prompt that are asked for (None: all but signs), each once, that an encoder reads."""
    found: dict[str, str] = {}
    for word in table.words if asked is None else asked:
        if asked is not None or any(map(str.isalnum, word)):
            found.setdefault(folded(word)[0], word)  # what `find` tells apart
    spans = {word: table.word_spans(word, missing_ok=True) for word in found.values()}
    return tuple(word for word, of in spans.items() if (of if streams is None else {*streams} & {*of}))


def grounding(model: MMDiT, asked: Spec | None = None) -> KnownLayers:
    """The layers asked for, else those that ground words; a pipeline goes by where it was loaded from."""
    if asked is not None:
        return KnownLayers(layer_indices(asked, len(model.layers)), "")
    names = (model.name, str(getattr(model.pipeline.config, "_name_or_path", "")))
    return grounding_layers(names, model.weight_hash, len(model.layers))
