"""Fig. 9a, 9b, 16, 25 to 27 and 30 of arXiv:2509.18096, re-measured: where tokens are looked for in the image.

    python figures/fig09_token_maps.py
    python figures/fig09_token_maps.py --model ... --layers 9,12 --marked-prompts "a [bird] and a [bear] in a forest"

Maps of the bracketed words are taken while the image is sampled, at the step nearest to the paper's sigma, from the
conditional branch. The empty prompt is read on a picture noised to that level. Writes under `figures/out/<model>/`:

    fig09a_token_maps      mean over heads and the three heads with most attention to the word, at two layers
    fig09b_pad_maps        padding tokens of the empty prompt
    fig16_i2t_t2i          I2T and T2I maps of the words        fig25_all_tokens   I2T maps of every prompt token
    fig26_heads_<k>        every head of every layer, one word per prompt (with a CSV of the attention it gets)
    fig30_empty_prompt     every token of the empty prompt

Layers: `--layers`, else the paper's experts, else (embedded models) the two whose maps segment scenes:train best.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from runs import given, model_of, options_of, paper_layers, run, target, write

from mmdit_probe import TextMaps, assets, probe
from mmdit_probe.errors import UserError, run_script
from mmdit_probe.experiments import Experiment, Result, SelectLayers
from mmdit_probe.experiments.experiment import Study, request_of, scheduled
from mmdit_probe.models.names import counts_of
from mmdit_probe.plots.sheet import sheet, short, wrapped
from mmdit_probe.segment.record import PAPER_SIGMA
from mmdit_probe.specs import layer_indices, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.store import TaskRecord
    from mmdit_probe.models.mmdit import MMDiT

PHOTO = ("a [mouse] using a [mushroom] as an [umbrella]", "a [bird] and a [bear] in a forest")
"""The subjects of the paper's Fig. 9, 26 and 27."""
OWN_SCALE = "each map from 0 (dark) to its own maximum (light)"


@dataclass(frozen=True, kw_only=True)
class TokenMaps(Experiment):
    """Pictures with the maps of their prompts' tokens, and of the empty prompt.

    Attributes:
        prompts: with their keywords in brackets; by default captions of scenes, or the paper's subjects.
        layers: whose maps are shown, best first; by default from the middle. num_steps: sampling steps.
    """

    name: ClassVar[str] = "token-maps"
    tables: ClassVar[tuple[str, ...]] = ("token_maps",)

    prompts: Sequence[str] = ()
    layers: Sequence[int] = ()
    num_steps: int = 28

    def gather(self, scenes: bool) -> tuple[list[str], list[np.ndarray]]:
        """Prompts, and pictures to read the empty prompt on; without any it is read on the first picture sampled."""
        prompts = list(self.prompts) or (scene_prompts() if scenes else list(PHOTO))
        for prompt in prompts:
            if not re.search(r"\[.+?\]", prompt):
                raise UserError(f"prompt {prompt!r} has no keyword in brackets; expected some, as in 'a [red] [ring]'")
        return prompts, scene_pictures() if scenes and not self.prompts else []

    def prepare(self, model: MMDiT, inputs: tuple[list[str], list[np.ndarray]]) -> Study:
        prompts, pictures = inputs
        middle, last = len(model.layers) // 2, len(model.layers) - 1
        layers = tuple(self.layers) or (middle, min(middle + 3, last))
        sigmas = model.sigmas(self.num_steps)
        step = min(range(self.num_steps), key=lambda k: abs(sigmas[k] - PAPER_SIGMA))
        request = request_of(
            model, prompts=prompts, layers=layers, sigma=sigmas[step], num_steps=self.num_steps, seed=self.seed,
            pictures=len(pictures),
        )  # fmt: skip
        tasks = [*enumerate(prompts), *((number, picture) for number, picture in enumerate(pictures))]
        return Study(
            model, request, tasks, "pictures", facts=scheduled(model, self.num_steps), state=(layers, step, pictures)
        )

    def measure(self, study: Study, task: tuple[int, Any], record: TaskRecord) -> None:
        (number, what), (layers, step, pictures) = task, study.state
        if not isinstance(what, str):
            self._empty(study.model, layers[0], number, what, record)
            return
        model, prompt, words = study.model, plain(what), re.findall(r"\[(.+?)\]", what)
        i2t, t2i = TextMaps(words, heads="all"), TextMaps(words, heads="all", queries="text")
        every = TextMaps()
        with probe(model, i2t, t2i, every, steps=step):
            image = np.asarray(model.generate(prompt, steps=self.num_steps, seed=self.seed + number)[0])
        maps = np.stack([i2t.maps(layer)[0].numpy() for layer in range(len(model.layers))])
        record.arrays(
            f"prompt{number}", image=image, prompt=np.array(prompt), words=np.array(words), i2t=maps,
            t2i=t2i.maps(layers[0])[0].mean(0).numpy(), tokens=every.maps(layers[0])[0].numpy(), **named(model, prompt),
        )  # fmt: skip
        record.write("token_maps", masses(prompt, words, maps))
        if number == 0 and not pictures:
            self._empty(model, layers[0], 0, image, record)

    def _empty(self, model: MMDiT, layer: int, number: int, picture: np.ndarray, record: TaskRecord) -> None:
        noised = model.noise(model.encode_image(picture), PAPER_SIGMA, self.seed)
        with probe(model, every := TextMaps(heads="all"), layers=layer):
            model.denoise(noised, PAPER_SIGMA, model.encode_prompt(""))
        maps, names = every.maps(layer).numpy(), named(model, "")
        record.arrays(f"empty{number}", image=picture, prompt=np.array(""), tokens=maps[0].mean(0), **names)
        found = masses("", list(names["labels"]), maps)
        record.write("token_maps", found.assign(layer=layer))

    def summarise(self, result: Result) -> pd.DataFrame:
        cell = ["prompt", "word", "layer"]
        return result.table.groupby(cell, observed=True, sort=False)[["mean", "maximum"]].mean().reset_index()

    def frames(self, result: Result) -> dict[str, pd.DataFrame]:
        table = result.table
        prompts = [plain(prompt) for prompt in result.request["prompts"][:2]]
        return {
            f"fig{26 + k}_heads": table[table["prompt"] == one].drop(columns="prompt") for k, one in enumerate(prompts)
        }

    def draw(self, result: Result) -> dict[str, Figure]:
        request, name = result.request, result.model_name
        layers: list[int] = request["layers"]
        prompts: list[Any] = [result.store.load_arrays(f"prompt{k}") for k in range(len(request["prompts"]))]
        empty: list[Any] = [result.store.load_arrays(f"empty{k}") for k in range(request["pictures"] or 1)]
        at_sigma = f"sigma {request['sigma']:.3f}"
        at = f"layer {layers[0]}, {at_sigma}"
        noised = f"layer {layers[0]}, sigma {PAPER_SIGMA}"
        words = f"{name}: I2T maps of a word, {at_sigma}"
        return {
            "fig09a_token_maps": token_maps(prompts, layers, words),
            "fig09b_pad_maps": pad_maps(empty, f"{name}: padding of the empty prompt, {noised}"),
            "fig16_i2t_t2i": both_ways(prompts, layers[0], f"{name}: I2T and T2I of the same words, {at}"),
            "fig25_all_tokens": all_tokens(prompts[0], f"{name}: I2T of every prompt token, {at}"),
            **{
                f"fig{26 + k}_heads": heads_of(one, f"{name}: I2T of '{one['words'][0]}' by head, {at_sigma}")
                for k, one in enumerate(prompts[:2])
            },
            "fig30_empty_prompt": all_tokens(empty[0], f"{name}: every token of the empty prompt, {noised}", True),
        }


def main() -> None:
    parser = options_of(__doc__, run=False)
    parser.add_argument(
        "--marked-prompts", action="append", default=[], help="prompt with its keywords in brackets; repeatable"
    )
    parser.add_argument("--layers", help="the two layers to show, best first: 9,12")
    options = parser.parse_args()
    asked = given(options, TokenMaps)
    how = {"prompts": options.marked_prompts, "layers": shown_layers(options)} | asked
    result = run(TokenMaps(**how), model_of(options), options)
    tables = result.frames
    for name, figure in result.figures.items():
        write(figure, target(options, result.model_name, name), tables.get(name))


def plain(prompt: str) -> str:
    """A prompt without the brackets around its keywords."""
    return re.sub(r"[\[\]]", "", prompt)


def named(model: Any, prompt: str) -> dict[str, Any]:
    """What each text position is: a label and a kind."""
    table = model.token_tables(prompt)[0].tokens
    labels = [
        f"{token.stream} {prompt[token.start : token.stop].strip() or token.word or ''}"
        if token.kind == "word"
        else f"{token.stream} {token.kind}"
        for token in table
    ]
    return {"labels": np.array(labels), "kinds": np.array([token.kind for token in table])}


def shown_layers(options: argparse.Namespace) -> list[int]:
    """The layers to show, best first; none if nothing says which."""
    if options.layers:
        counts = counts_of(options.model)
        most = counts[0] if counts else int(1e6)
        return [layer for part in listed(options.layers) for layer in layer_indices(part, most)]
    known = paper_layers(options.model)
    if known:
        return known if len(known) > 1 else [known[0], known[0] + 3]  # Fig. 9 shows 9 and 12 of SD3
    if options.model in assets.names():
        choice = SelectLayers(evidence="segmentation", rule="segmentation", split="train", report="val", top=2)
        return list(choice.selected(run(choice, model_of(options), options)).layers)
    return []


def scene_prompts(count: int = 3) -> list[str]:
    """Held-out captions with two different objects, each named once; objects and grounds are the keywords."""
    from mmdit_probe.scenes import captions, parse

    found = []
    for text in captions("val", 100):
        facts = parse(text)
        nouns = [group.noun for group in facts.groups if group.count == 1]
        if len(nouns) == len(set(nouns)) == len(facts.groups) == 2:
            words = {*nouns, *facts.grounds}
            found.append(" ".join(f"[{word}]" if word in words else word for word in text.split()))
    return found[:count]


def scene_pictures() -> list[np.ndarray]:
    """Two held-out scenes with more than one object."""
    from mmdit_probe.scenes import scene

    scenes = (scene("val", index) for index in range(50))
    return [one.image for one in scenes if len(one.objects) > 1][:2]


def token_maps(prompts: list[dict[str, Any]], layers: list[int], title: str) -> Any:
    """Fig. 9a: a row per prompt and layer."""
    cells, captions, rows = [], [], []
    for one in prompts:
        for layer in layers[:2]:
            maps = one["i2t"][layer, ..., 0]  # [H, h, w]
            heads = np.argsort(-maps.mean((1, 2)), kind="stable")[:3]
            cells.append([one["image"], maps.mean(0), *maps[heads]])
            captions.append(["", "all heads", *(f"head {head}" for head in heads)])
            rows.append(f"layer {layer}: {one['words'][0]}")
    note = f"heads: the three that give the word most attention; {OWN_SCALE}"
    return sheet(cells, rows=rows, captions=captions, title=title, note=note)


def pad_maps(pictures: list[dict[str, Any]], title: str, count: int = 7) -> Any:
    """Fig. 9b: padding tokens spread over the streams, a row per picture."""
    cells, captions = [], []
    for one in pictures:
        pads = np.flatnonzero(one["kinds"] == "pad")
        pads = pads if len(pads) else np.arange(len(one["kinds"]))
        chosen = pads[np.linspace(0, len(pads) - 1, min(count, len(pads))).round().astype(int)]
        cells.append([one["image"], *(one["tokens"][..., place] for place in chosen)])
        captions.append(["picture", *(f"{one['labels'][place]}\nposition {place}" for place in chosen)])
    return sheet(cells, captions=captions, title=title, note=f"clip, t5: text encoders; {OWN_SCALE}")


def both_ways(prompts: list[dict[str, Any]], layer: int, title: str) -> Any:
    """Fig. 16: per word the map of I2T and that of T2I."""
    cells, captions = [], []
    across = 1 + 2 * max(len(one["words"]) for one in prompts)
    for one in prompts:
        i2t = one["i2t"][layer].mean(0)
        pairs = [(i2t[..., k], one["t2i"][..., k]) for k in range(len(one["words"]))]
        texts = [(f"{word}: I2T", f"{word}: T2I") for word in one["words"]]
        cells.append([one["image"], *(cell for pair in pairs for cell in pair)])
        captions.append(["", *(text for pair in texts for text in pair)])
        cells[-1] += [None] * (across - len(cells[-1]))
        captions[-1] += [""] * (across - len(captions[-1]))
    note = f"I2T: attention of the image token to the word; T2I: of the word to the image token; {OWN_SCALE}"
    return sheet(cells, captions=captions, rows=[str(one["prompt"]) for one in prompts], title=title, note=note)


def all_tokens(one: dict[str, Any], title: str, whole: bool = False) -> Any:
    """Fig. 25 and 30: a map per text token; without `whole`, padding is left out."""
    places = [k for k, kind in enumerate(one["kinds"]) if whole or kind not in ("pad", "null")]
    cells, captions = wrapped(
        [one["image"], *(one["tokens"][..., k] for k in places)],
        ["picture", *(str(one["labels"][k]) for k in places)], across=8 if len(places) < 100 else 14,
    )  # fmt: skip
    note = f"{one['prompt'] or 'empty prompt'}; clip, t5: text encoders; {OWN_SCALE}"
    return sheet(cells, captions=captions, title=title, note=note)


def heads_of(one: dict[str, Any], title: str) -> Any:
    """Fig. 26 and 27: a row per layer, a column per head, for the prompt's first keyword."""
    maps = one["i2t"][..., 0]  # [L, H, h, w]
    blank = [None] * (len(maps) - 1)
    pictures = [one["image"], *blank]
    cells = [[picture, *layer] for picture, layer in zip(pictures, maps, strict=True)]
    columns = ["", *(f"head {head}" if maps.shape[1] < 12 else str(head) for head in range(maps.shape[1]))]
    rows = [f"layer {layer}\nmax {short(float(of.max()))}" for layer, of in enumerate(maps)]
    return sheet(
        cells, columns=columns, rows=rows, scale="row", title=title,
        note=f"{one['prompt']}: each layer from 0 to its maximum", side=0.55 if maps.shape[1] < 12 else 0.28,
    )  # fmt: skip


def masses(prompt: str, words: Sequence[str], maps: np.ndarray) -> pd.DataFrame:
    """Attention that an image token gives to each word, by layer and head: mean and maximum over the image.

    Args:
        maps: [L, H, h, w, W].
    """
    layer, head, word = (axis.ravel() for axis in np.indices((*maps.shape[:2], maps.shape[-1])))
    return pd.DataFrame(
        {"prompt": prompt, "word": np.array(words)[word], "layer": layer, "head": head,
         "mean": maps.mean((2, 3)).ravel(), "maximum": maps.max((2, 3)).ravel()}
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
