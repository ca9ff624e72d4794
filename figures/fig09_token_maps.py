"""Fig. 9a, 9b, 16, 25 to 27 and 30 of arXiv:2509.18096, re-measured: where tokens are looked for in the image.

    python figures/fig09_token_maps.py
    python figures/fig09_token_maps.py --model ... --layers 9,12 --prompt "a [bird] and a [bear] in a forest"

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
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from runs import model_of, options_of, paper_layers, run_folder, target, write

from mmdit_probe import assets
from mmdit_probe.observe.maps import TextMaps
from mmdit_probe.plots.sheet import sheet, short, wrapped
from mmdit_probe.results import RunFolder
from mmdit_probe.results.folder import read_record
from mmdit_probe.results.selection import load_selection

COMMAND = "token-maps"
SIGMA = 0.515
"""The paper's t = 8 of 28 steps."""
PHOTO = ("a [mouse] using a [mushroom] as an [umbrella]", "a [bird] and a [bear] in a forest")
"""The subjects of the paper's Fig. 9, 26 and 27."""
SELECT = ("--evidence", "segmentation", "--rule", "segmentation", "--split", "train", "--report", "val", "--top", "2")


def main() -> None:
    parser = options_of(__doc__, "token-maps, the folder that this script makes")
    parser.add_argument("--prompt", action="append", help="prompt with its keywords in brackets; repeatable")
    parser.add_argument("--layers", help="the two layers to show, best first: 9,12")
    parser.add_argument("--steps", type=int, default=28, help="sampling steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.run or measured(options)
    record = read_record(folder) or {}
    request = record["request"]
    model, layers = model_of(folder), request["layers"]
    name = Path(model).name
    prompts = [load(folder / f"prompt{k}.npz") for k in range(len(request["prompts"]))]
    empty = [load(folder / f"empty{k}.npz") for k in range(request["pictures"])]
    sigma = f"sigma {record['sigma']:.3f}"
    at, noised = f"layer {layers[0]}, {sigma}", f"layer {layers[0]}, sigma {SIGMA}"

    def put(stem: str, figure: Any, table: pd.DataFrame | None = None) -> None:
        write(figure, target(options, model, stem), table)

    put("fig09a_token_maps", token_maps(prompts, layers, f"{name}: I2T maps of a word, {sigma}"))
    put("fig09b_pad_maps", pad_maps(empty, f"{name}: padding of the empty prompt, {noised}"))
    put("fig16_i2t_t2i", both_ways(prompts, layers[0], f"{name}: I2T and T2I of the same words, {at}"))
    put("fig25_all_tokens", all_tokens(prompts[0], f"{name}: I2T of every prompt token, {at}"))
    for k, one in enumerate(prompts[:2]):
        put(f"fig{26 + k}_heads", heads_of(one, name), masses(one))
    put("fig30_empty_prompt", all_tokens(empty[0], f"{name}: every token of the empty prompt, {noised}", whole=True))


def measured(options: argparse.Namespace) -> Path:
    """The run folder of this request: prompts, pictures and maps as npz files. Measured unless it is there."""
    layers = shown_layers(options)
    from mmdit_probe.cli.session import open_model
    from mmdit_probe.observe.probe import probe

    model = open_model(options.model, debug=False, device=options.device)
    layers = layers or [len(model.layers) // 2, min(len(model.layers) // 2 + 3, len(model.layers) - 1)]
    prompts = options.prompt or (scene_prompts() if options.model in assets.names() else list(PHOTO))
    pictures = scene_pictures() if options.model in assets.names() and not options.prompt else None
    request = {
        "model": model.name, "weight_hash": model.weight_hash, "prompts": prompts, "layers": layers, "sigma": SIGMA,
        "steps": options.steps, "seed": options.seed, "pictures": 2 if pictures else 1,
    }  # fmt: skip
    folder = RunFolder.open(COMMAND, request, resume=not options.fresh)
    if folder.complete:
        return folder.path
    sigmas = model.sigmas(options.steps)
    step = min(range(options.steps), key=lambda k: abs(sigmas[k] - SIGMA))
    made = []
    for k, marked in enumerate(prompts):
        prompt, words = marked.replace("[", "").replace("]", ""), re.findall(r"\[(.+?)\]", marked)
        i2t, t2i = (TextMaps(words, heads="all", queries=side) for side in ("image", "text"))  # type: ignore[arg-type]
        every = TextMaps()
        with probe(model, i2t, t2i, every, steps=step):
            image = model.generate(prompt, steps=options.steps, seed=options.seed + k)[0]
        made.append(np.asarray(image))
        count = range(len(model.layers))
        np.savez_compressed(
            folder.path / f"prompt{k}.npz", image=made[-1], prompt=prompt, words=words,
            i2t=np.stack([i2t.maps(layer)[0].numpy() for layer in count]),
            t2i=t2i.maps(layers[0])[0].mean(0).numpy(), tokens=every.maps(layers[0])[0].numpy(), **named(model, prompt),
        )  # fmt: skip
    for k, picture in enumerate(pictures or made[:1]):
        noised = model.noise(model.encode_image(picture), SIGMA, options.seed)
        with probe(model, every := TextMaps(), layers=layers[0]):
            model.denoise(noised, SIGMA, model.encode_prompt(""))
        tokens = every.maps(layers[0])[0].numpy()
        np.savez_compressed(
            folder.path / f"empty{k}.npz", image=picture, prompt="", tokens=tokens, **named(model, "")
        )  # fmt: skip
    folder.finish(device=str(model.device), seed=options.seed, sigma=sigmas[step])
    return folder.path


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
        return [int(layer) for layer in options.layers.split(",")]
    known = paper_layers(options.model)
    if known:
        return known if len(known) > 1 else [known[0], known[0] + 3]  # Fig. 9 shows 9 and 12 of SD3
    if options.model in assets.names():
        file = run_folder(argparse.Namespace(**vars(options) | {"run": None}), "select-layers", SELECT)
        return list(load_selection(file).layers)
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


def load(path: Path) -> dict[str, Any]:
    with np.load(path) as stored:
        return dict(stored)


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
    note = "heads: the three that give the word most attention; each map from 0 to its maximum"
    return sheet(cells, rows=rows, captions=captions, title=title, note=note)


def pad_maps(pictures: list[dict[str, Any]], title: str, count: int = 7) -> Any:
    """Fig. 9b: padding tokens spread over the streams, a row per picture."""
    cells, captions = [], []
    for one in pictures:
        pads = np.flatnonzero(one["kinds"] == "pad")
        pads = pads if len(pads) else np.arange(len(one["kinds"]))
        chosen = pads[np.linspace(0, len(pads) - 1, min(count, len(pads))).round().astype(int)]
        cells.append([one["image"], *(one["tokens"][..., place] for place in chosen)])
        captions.append(["picture", *(f"{one['labels'][place]}, {place}" for place in chosen)])
    return sheet(cells, captions=captions, title=title, note="each map from 0 to its maximum")


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
    note = "I2T: attention of the image token to the word; T2I: of the word to the image token; each to its maximum"
    return sheet(cells, captions=captions, rows=[str(one["prompt"]) for one in prompts], title=title, note=note)


def all_tokens(one: dict[str, Any], title: str, whole: bool = False) -> Any:
    """Fig. 25 and 30: a map per text token; without `whole`, padding is left out."""
    places = [k for k, kind in enumerate(one["kinds"]) if whole or kind not in ("pad", "null")]
    cells, captions = wrapped(
        [one["image"], *(one["tokens"][..., k] for k in places)],
        ["picture", *(str(one["labels"][k]) for k in places)], across=8 if len(places) < 100 else 14,
    )  # fmt: skip
    note = f"{one['prompt'] or 'empty prompt'}: each map from 0 to its maximum"
    return sheet(cells, captions=captions, title=title, note=note)


def heads_of(one: dict[str, Any], name: str) -> Any:
    """Fig. 26 and 27: a row per layer, a column per head, for the prompt's first keyword."""
    maps = one["i2t"][..., 0]  # [L, H, h, w]
    blank = [None] * (len(maps) - 1)
    pictures = [one["image"], *blank]
    cells = [[picture, *layer] for picture, layer in zip(pictures, maps, strict=True)]
    columns = ["", *(f"head {head}" if maps.shape[1] < 12 else str(head) for head in range(maps.shape[1]))]
    rows = [f"layer {layer}\nmax {short(float(of.max()))}" for layer, of in enumerate(maps)]
    return sheet(
        cells, columns=columns, rows=rows, scale="row", title=f"{name}: I2T of '{one['words'][0]}'",
        note=f"{one['prompt']}: each layer from 0 to its maximum", side=0.55 if maps.shape[1] < 12 else 0.28,
    )  # fmt: skip


def masses(one: dict[str, Any]) -> pd.DataFrame:
    """Attention that an image token gives to each word, by layer and head: mean and maximum over the image."""
    layers, heads, _, _, words = one["i2t"].shape
    return pd.DataFrame(
        [
            {"word": one["words"][k], "layer": layer, "head": head, "mean": one["i2t"][layer, head, ..., k].mean(),
             "maximum": one["i2t"][layer, head, ..., k].max()}
            for k in range(words) for layer in range(layers) for head in range(heads)
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
