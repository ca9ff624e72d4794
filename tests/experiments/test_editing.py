"""Stock editing pipelines, end to end: what they are given, which text token is which, and what experiments make of it,
against the float64 softmax over each pipeline's own calls."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmdit_probe import AttentionMass, MMDiT, load, probe, word_maps
from mmdit_probe.attention import reference
from mmdit_probe.data import parse_classes
from mmdit_probe.edit import RemoveBlock, Scale, ScaleText, Swap
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.experiments import (
    AttentionBudget,
    BlockOperations,
    Explore,
    FeaturePCA,
    Perturb,
    Score,
    Segment,
    SwapTest,
    ValueNorms,
)
from mmdit_probe.models.latents import unpack
from mmdit_probe.models.layout import find_layers
from mmdit_probe.models.pipeline_call import first_call
from mmdit_probe.segment.capture import Reading, capture
from tests.editing_pipelines import PICTURE, PIPELINES, build, picture, small
from tests.observe.test_families import written_down

PROMPT = "a red ring"
PICTURES = {
    "kontext": [picture(48, 64)], "flux2": [picture(64, 96), picture(96, 64, 1)], "qwen_edit": [picture(32, 64)],
    "qwen_edit_plus": [picture(32, 64), picture(64, 32, 1)],
}  # fmt: skip
REFERENCES = {"kontext": [12], "flux2": [24, 24], "qwen_edit": [8], "qwen_edit_plus": [8, 8]}
HEIGHT, WIDTH, IMAGE = 32, 64, 8


@pytest.fixture(autouse=True)
def tiny_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        yield


@functools.cache
def model_of(name: str) -> MMDiT:
    return MMDiT(build(name), name).given(PICTURES[name])


def sample(model: MMDiT, **options: Any) -> Any:
    how = {"steps": 1, "guidance": 1.0, "height": HEIGHT, "width": WIDTH, "output_type": "latent"}
    return model.generate(PROMPT, **(how | options))


def probabilities(model: MMDiT, run: Any, layer: int = 1) -> Tensor:
    """[H, N, N] float64 of the one call that `run` makes."""
    path = find_layers(model.family, model.transformer)[layer].path
    with written_down(model.transformer) as calls:
        run()
    (call,) = calls[path]
    return reference.probabilities(call.query, call.key, call.attn_mask, call.is_causal, call.scale)[0]


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_stock_pipeline_is_read_by_its_pictures_and_words(name: str) -> None:
    """Text first, then the image, then the references: the pipelines' own order."""
    model = model_of(name)
    p = probabilities(model, lambda: sample(model))
    with probe(model.pipeline, AttentionMass(), layers=[1]) as run:
        sample(model)
    table = run[AttentionMass].table()
    assert set(table["prompt"]) == {PROMPT} and set(table["branch"]) == {"cond"}
    text = p.shape[-1] - IMAGE - sum(REFERENCES[name])
    edges = np.cumsum([text, IMAGE, *REFERENCES[name]]).tolist()
    spans = [slice(0, text), *(slice(*pair) for pair in itertools.pairwise(edges))]
    kinds = ["text", "image", *(["reference"] * len(REFERENCES[name]))]
    numbers = ["", "all", *map(str, range(len(REFERENCES[name])))]
    asked = {"image": spans[1], "text": spans[0], "reference": slice(edges[1], edges[-1])}
    for query, rows in asked.items():
        own = table[table["query"] == query]
        for key, number, columns in zip(kinds, numbers, spans, strict=True):
            part = own[(own["key"] == key) & ((own["span"] == number) | (key == "text"))]
            wanted = p[:, rows][:, :, columns].sum(-1).mean(1)
            np.testing.assert_allclose(part.groupby("head")["mass"].sum(), wanted, atol=3e-6)
        np.testing.assert_allclose(own.groupby("head")["mass"].sum(), 1, atol=1e-5)


@pytest.mark.parametrize("prompt", [PROMPT, f"{PROMPT}, " + "a blue house, " * 60 + PROMPT], ids=["short", "long"])
@pytest.mark.parametrize("name", ["qwen_edit", "qwen_edit_plus"])
def test_text_positions_are_those_of_the_pipeline_s_own_processor(name: str, prompt: str) -> None:
    """Beside pictures no prompt is cut off, whatever its length."""
    model = model_of(name)
    pipe, found = model.pipeline, []
    processor = type(pipe.processor)
    call = processor.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "__call__", lambda *args, **kw: (found.append(call(*args, **kw)), found[-1])[1])
        table = MMDiT(pipe, name).given(PICTURES[name]).encode_prompt(prompt).tokens[0]
    ids = found[0]["input_ids"][0, pipe.prompt_template_encode_start_idx :].tolist()
    assert len(ids) == len(table)
    shown = pipe.tokenizer.convert_tokens_to_ids(PICTURE)
    assert table.positions(kind="vision") == [p for p, token in enumerate(ids) if token == shown]
    assert pipe.tokenizer.decode([ids[p] for p in table.positions(kind="word")]) == prompt and not table.truncated
    last = table.word_spans("ring", prompt.count("ring") - 1)["llm"]
    assert pipe.tokenizer.decode([ids[p] for p in last]).strip() == "ring"


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_denoising_call_is_the_editing_pipeline_s_own(name: str) -> None:
    model = model_of(name)
    stepped: list[Tensor] = []
    noise: list[Tensor] = []
    step = model.scheduler.step
    model.scheduler.step = lambda output, t, x, *args, **kwargs: (
        stepped.append(output.clone()), noise.append(x.clone()), step(output, t, x, *args, **kwargs)
    )[-1]  # fmt: skip
    try:
        sample(model, guidance=3.5 if model.family.distilled and name != "flux2" else 1.0)
    finally:
        del model.scheduler.step
    size = (HEIGHT // model.latent_side, WIDTH // model.latent_side)
    latents, wanted = (unpack(of, "packed", 2, size) for of in (noise[0], stepped[0]))
    found = model.denoise(latents, 1.0, model.encode_prompt(PROMPT))
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus"])
def test_word_maps_over_the_picture_and_over_a_reference(name: str) -> None:
    model = model_of(name)
    of, number = MMDiT(model.pipeline, name), len(PICTURES[name]) - 1
    p = probabilities(model, lambda: sample(model, seed=3)).mean(0)
    text = p.shape[-1] - IMAGE - sum(REFERENCES[name])
    table = model.encode_prompt(PROMPT).tokens[0] if name != "kontext" else model.token_tables(PROMPT)[0]
    ring = table.positions(word="ring")
    how: dict[str, Any] = {
        "words": "ring", "layers": [1], "num_steps": 1, "guidance": 1.0, "seed": 3, "height": HEIGHT, "width": WIDTH,
        "references": PICTURES[name],
    }  # fmt: skip
    maps = word_maps(of, PROMPT, **how)
    np.testing.assert_allclose(maps["ring"].array.ravel(), p[text : text + IMAGE][:, ring].sum(1), atol=3e-6)
    over = word_maps(of, PROMPT, over=number, **how)
    own = p[-REFERENCES[name][number] :][:, ring].sum(1)
    np.testing.assert_allclose(over["ring"].array.ravel(), own, atol=3e-6)
    assert over["ring"].array.shape == {"kontext": (3, 4), "qwen_edit_plus": (2, 4)}[name]
    assert over.image.size == PICTURES[name][number].size
    assert not of.references  # only the run's own copy was given any
    with pytest.raises(UserError, match=rf"no reference 2: {number + 1} are given"):
        word_maps(of, PROMPT, over=2, **how)


def test_budget_norms_and_explorer_have_the_references(tmp_path: Path) -> None:
    model = MMDiT(build("flux2"), "flux2")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for file, one in zip(files, PICTURES["flux2"], strict=True):
        one.save(file)
    how: dict[str, Any] = {"references": f"{files[0]}, {files[1]}"}
    budget = AttentionBudget(prompts=[PROMPT], images=[picture(32, 32)], layers="0-1", **how).run(model, progress=False)
    summary = budget.summary
    np.testing.assert_allclose(summary[["I2I", "I2T", "I2R", "I2O"]].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(summary[["T2I", "T2T", "T2R", "T2O"]].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(summary[["R2I", "R2T", "R2R", "R2O"]].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(summary[["I2R_0", "I2R_1"]].sum(axis=1), summary["I2R"], atol=1e-6)
    assert {"I2R", "R2T", "I2R_1"} <= set(budget.texts()[0].columns)
    assert [axes.get_title(loc="left") for axes in budget.figure().axes][2] == "reference queries: R2I | R2T"
    assert len(budget.request["references"]) == 2
    norms = ValueNorms(prompts=[PROMPT], images=[picture(32, 32)], layers="0-1", **how).run(model, progress=False)
    assert (norms.summary["reference"] > 0).all() and norms.figure()
    pages = Explore(prompt=PROMPT, images=picture(32, 32), **how).run(model, progress=False)
    shown = pages.experiment.explorations(pages)[0]
    assert "reference" in shown.kinds and list(shown.queries) == ["image", "text", "reference"]
    np.testing.assert_allclose(shown.budget.sum(-1), 1, atol=1e-4)
    assert "reference queries" in pages.experiment.pages(pages)[0].html


def test_a_picture_is_segmented_beside_and_as_its_own_reference() -> None:
    model = MMDiT(build("kontext"), "kontext")
    image = np.asarray(picture(48, 64))
    classes = parse_classes("ring, red")
    for how in ("beside", "read"):
        reading = Reading(layers=[1], size=(48, 64), reference=how)  # type: ignore[arg-type]
        found: list[Any] = []
        p = probabilities(model, lambda: found.append(capture(model, image, classes, reading)))  # noqa: B023
        text = p.shape[-1] - 24
        own = p[:, text : text + 12] if how == "beside" else p[:, text + 12 :]
        np.testing.assert_allclose(found[0].passes[0].records[1].i2t, own[..., :text], atol=3e-6)
        assert found[0].grid == (3, 4)
    result = Segment(image=picture(48, 64), classes="ring, red", layers="1", size="48x64", as_reference="read").run(
        model, progress=False
    )
    assert result.labels.shape == (48, 64) and result.request["reference"] == "read"
    with pytest.raises(UserError, match="no tokens of a reference"):
        capture(model, image, classes, Reading(layers=[1], reference="read"), keep=("concepts",))


def test_pictures_that_a_pipeline_does_not_take_are_refused() -> None:
    from tests.pipelines import build as plain

    model = MMDiT(plain("flux"), "flux").given([picture(32, 32)])
    with pytest.raises(UserError, match="FluxPipeline takes no pictures beside the prompt: leave the references out"):
        model.encode_prompt(PROMPT)


@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus"])
def test_a_directory_of_an_editing_pipeline_is_loaded(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    if name == "kontext":
        pipe.save_pretrained(tmp_path, safe_serialization=True)
        model = load(tmp_path, device="cpu").given(PICTURES[name])
        assert first_call(model.pipeline, PROMPT, image=PICTURES[name][0], height=32, width=32, max_area=1024)
        assert model.encode_prompt("a red ring").tokens[0].word_spans("red")
    assert type(pipe).__name__ in model_of(name).family.pipelines


def test_perturb_and_pca_are_given_the_references() -> None:
    """Zeroing I2R is Scale's zero on the same pictures; the control of random weights has the references, too."""
    model = MMDiT(build("kontext"), "kontext")
    model.size = (HEIGHT, WIDTH)
    how: dict[str, Any] = {"references": PICTURES["kontext"], "num_steps": 1, "guidance": 1.0, "clip": "none"}
    ask = Perturb(layers="0", prompts=[PROMPT], key="reference", edit="zero", control="random", shown=1, **how)
    found = ask.run(model, progress=False)
    stock = sample(model.given(PICTURES["kontext"]), guidance=1.0, seed=0, output_type="pil")[0]
    with probe(model, edits=Scale("image", "reference", factor=0.0, layers=[0])):
        edited = sample(model.given(PICTURES["kontext"]), guidance=1.0, seed=0, output_type="pil")[0]
    pictures = {name: found.store.load_picture(name) for name in found.store.picture_names()}
    assert np.array_equal(pictures["000-stock"], stock) and np.array_equal(pictures["000-edit-layer0"], edited)
    change = found.table.set_index(["control", "condition"])["change"]
    assert change["none", "edit"] > 0 and change["random", "edit"] > 0 and change["none", "no-op"] == 0
    assert found.request["references"] and "I2R" in str(found.figure().get_suptitle())
    maps = FeaturePCA(images=[picture(32, 64)], prompts=PROMPT, references=PICTURES["kontext"], layers="0",
                      components=2, kinds="value", over=0).run(model, progress=False)  # fmt: skip
    shown = maps.store.load_arrays("shown")
    assert shown["0:value"].shape == (1, 3, 4, 2) and np.array_equal(shown["pictures"][0], PICTURES["kontext"][0])
    with pytest.raises(UserError, match="--sweep span tells kinds of text tokens apart"):
        Perturb(sweep="span", key="reference")


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_a_block_s_text_is_scaled_beside_references(factor: float) -> None:
    """Stock blocks whose text comes in scaled by a hook of one's own; image and references stay as they are."""
    model = model_of("kontext")
    double, single = len(model.transformer.transformer_blocks), model.transformer.single_transformer_blocks
    for layer, block in ((0, model.transformer.transformer_blocks[0]), (double, single[0])):

        def scaled(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"encoder_hidden_states": factor * kwargs["encoder_hidden_states"]}

        handle = block.register_forward_pre_hook(scaled, with_kwargs=True)
        wanted = sample(model, seed=2)
        handle.remove()
        with probe(model, edits=ScaleText(layers=[layer], factor=factor)):
            found = sample(model, seed=2)
        assert torch.equal(found, wanted) and not torch.equal(found, sample(model, seed=2))


def test_block_operations_are_given_the_references() -> None:
    model = MMDiT(build("flux2"), "flux2")
    model.size = (HEIGHT, WIDTH)
    found = BlockOperations(layers="0", prompts=[PROMPT], references=PICTURES["flux2"], operations="remove,silence",
                            num_steps=1, guidance=1.0, clip="none").run(model, progress=False)  # fmt: skip
    own = model.given(PICTURES["flux2"])
    stock = sample(own, seed=0, output_type="pil")[0]
    with probe(own, edits=RemoveBlock(layers=[0])):
        removed = sample(own, seed=0, output_type="pil")[0]
    pictures = {name: found.store.load_picture(name) for name in found.store.picture_names()}
    assert np.array_equal(pictures["000-stock"], stock) and np.array_equal(pictures["000-remove-layer0"], removed)
    assert (found.summary.query("outcome == 'change'")["difference"] > 0).all() and found.figure()
    assert len(found.request["references"]) == 2


@pytest.mark.parametrize("name", ["kontext", "qwen_edit_plus"])
def test_scores_are_of_the_stock_pipeline_s_edits(name: str, tmp_path: Path) -> None:
    """Several prompts and pictures of each, also where a pipeline takes one prompt at a time."""
    model, prompts = MMDiT(build(name), name), [PROMPT, "a blue house"]
    model.size = (HEIGHT, WIDTH)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    found = Score(prompts=str(tmp_path / "prompts.txt"), references=PICTURES[name], num_steps=1, guidance=1.0,
                  images_per_prompt=2, export=tmp_path / "out").run(model, progress=False)  # fmt: skip
    assert len(found.table) == 4 and len(found.request["references"]) == len(PICTURES[name])
    for row in found.table.to_dict("records"):
        given = PICTURES[name] if len(PICTURES[name]) > 1 else PICTURES[name][0]
        scale = "guidance_scale" if name == "kontext" else "true_cfg_scale"
        size = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": model.max_sequence_length}
        size |= {"max_area": HEIGHT * WIDTH} if name == "kontext" else {}
        made = model.pipeline(
            image=given, prompt=row["prompt"], generator=torch.Generator().manual_seed(row["seed"]),
            num_inference_steps=1, **{scale: 1.0}, **size,
        ).images[0]  # fmt: skip
        written = [np.asarray(Image.open(file)) for file in (tmp_path / "out").rglob(f"{row['prompt']}_*.png")]
        assert len(written) == 2 and any(np.abs(one.astype(int) - np.asarray(made)).max() <= 1 for one in written)


def test_words_are_exchanged_beside_references() -> None:
    """A model of the scenes world that edits: swap-test ends, and its swaps are those of the same pictures."""
    model = MMDiT(build("kontext"), "scenes-sd3")
    model.size = (HEIGHT, WIDTH)
    text = "a red ring and a blue house on grass"
    found = SwapTest(prompts=[text], layers="0", references=PICTURES["kontext"], num_steps=1, guidance=1.0,
                     control="none").run(model, progress=False)  # fmt: skip
    own = model.given(PICTURES["kontext"])
    with probe(own, edits=Swap(words=("red", "blue"), layers=[0])):
        swapped = own.generate(text, steps=1, guidance=1.0, seed=0)[0]
    assert np.array_equal(found.store.load_picture("000-swap-layer0"), swapped)
    change = found.table.set_index("condition")["change"]
    assert change["swap"] > 0 and change["stock"] == 0 and len(found.request["references"]) == 1


def test_a_pipeline_that_only_edits_asks_for_a_picture_before_it_is_loaded(tmp_path: Path) -> None:
    told = "edits a picture: give it one as reference"
    model = MMDiT(build("qwen_edit"), "qwen_edit")
    for use in (lambda: model.generate(PROMPT), lambda: model.encode_prompt(PROMPT)):
        with pytest.raises(UserError, match=f"QwenImageEditPipeline {told}"):
            use()
    with pytest.raises(UserError, match=r"one prompt at a time beside pictures, and 2 are given: .*batch 1"):
        model.given(PICTURES["qwen_edit"]).encode_prompt([PROMPT, PROMPT])
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "QwenImageEditPlusPipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]}'
    )
    with pytest.raises(UserError, match=f"QwenImageEditPlusPipeline {told}"):
        AttentionBudget(prompts=[PROMPT]).run(str(tmp_path), progress=False)


def test_pictures_that_a_call_was_not_given_are_named() -> None:
    """A pipeline that is given whole, and edits: what it says itself, and the arguments that were left out."""

    class Filling:
        transformer = torch.nn.Linear(1, 1)

        def __call__(
            self, prompt: str, image: Any = None, mask_image: Any = None, num_inference_steps: int = 1
        ) -> None:
            image.size  # noqa: B018

    with pytest.raises(RunError, match=r"Filling cannot be run with a prompt alone \(without image, mask_image\)"):
        first_call(Filling(), PROMPT)
