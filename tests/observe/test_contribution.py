"""Contribution against the explicit softmax, the values and the projection in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_probe import UserError, probe
from mmdit_probe.attention import reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit import Scale
from mmdit_probe.models.families.registry import FAMILIES, family_of
from mmdit_probe.models.layout import arranged, find_layers
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.tokens import token_tables
from mmdit_probe.observe.contribution import COLUMNS, Contribution, linear_map
from mmdit_probe.observe.maps import JointBlocks
from mmdit_probe.observe.probe import ForwardEnded
from tests import tiny
from tests.families import FIXTURES
from tests.observe.test_families import IMAGE, OTHER, REFERENCE, TEXT, case_of, joint_paths, run, samples, written_down

PROMPTS = ["a red ring", "a cat"]


def sample(pipe: Any) -> None:
    pipe(
        PROMPTS, max_sequence_length=tiny.T5_LENGTH, generator=torch.Generator().manual_seed(1), num_inference_steps=2,
        guidance_scale=4.0, output_type="latent",
    )  # fmt: skip


def parts(call: SDPACall, row: int, weight: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """[H, I, E]: what keys write into queries through the output projection [E, H * D], by the whole matrix."""
    of = slice(row, row + 1) if len(call.query) > 1 else slice(None)
    mask = call.attn_mask
    mask = mask if mask is None or len(mask) == 1 else mask[of]
    p = reference.probabilities(call.query[of], call.key[of], mask, call.is_causal, call.scale)[0]
    value = call.expanded_value()[of][0].double()
    read = p[:, queries][..., keys] @ value[:, keys]  # [H, I, D]
    return torch.stack([read[h] @ of_head.mT for h, of_head in enumerate(weight.double().chunk(len(read), 1))])


def expected(found: Tensor, whole: Tensor) -> list[float]:
    """norm, cosine and share of contributions [I, E] beside the whole update [I, E]."""
    inner = (found * whole).sum(-1)
    cosine = torch.nn.functional.cosine_similarity(found, whole, dim=-1)
    return [float(x.mean()) for x in (found.norm(dim=-1), cosine, inner / whole.square().sum(-1))]


@pytest.mark.parametrize("variant", ["sd3", "sd35"])
def test_every_row_is_the_dense_computation(variant: str) -> None:
    pipe = tiny.pipeline(variant)
    with written_down(pipe.transformer) as calls:
        sample(pipe)
    with probe(pipe, Contribution()) as seen:
        sample(pipe)
    table = seen[Contribution].table()
    assert list(table.columns) == list(COLUMNS)
    tables = [*token_tables(pipe, FAMILIES["sd3"], ["", ""], tiny.T5_LENGTH)]
    tables += token_tables(pipe, FAMILIES["sd3"], PROMPTS, tiny.T5_LENGTH)
    image, total = list(range(16)), 16 + tiny.CLIP_LENGTH + tiny.T5_LENGTH
    checked = 0
    for layer, path in enumerate(layer.path for layer in find_layers(family_of(pipe.transformer), pipe.transformer)):
        weight = pipe.transformer.get_submodule(path).to_out[0].weight
        joint = [call for call in calls[path] if call.query.shape[-2] == total]
        for place, tokens in enumerate(tables):
            branch, prompt = ("uncond", "cond")[place // 2], PROMPTS[place % 2]
            part = table[
                (table["step"] == 1) & (table["layer"] == layer) & (table["branch"] == branch)
                & (table["prompt"] == prompt)
            ]  # fmt: skip
            whole = parts(joint[1], place, weight, image, list(range(total)))
            for row in part.itertuples():
                text = [
                    16 + p
                    for p, token in enumerate(tokens.tokens)
                    if row.span in ("all", token.kind) and row.stream in ("", token.stream)
                    and row.word_index in (-1, token.word_index)
                ]  # fmt: skip
                keys = {"all": list(range(total)), "image": image, "other": [], "text": text}[row.key]
                own = parts(joint[1], place, weight, image, keys)
                own = own.sum(0) if row.head == -1 else own[row.head]
                assert [row.norm, row.cosine, row.share] == pytest.approx(
                    expected(own, whole.sum(0)), rel=1e-4, abs=1e-5
                ), row
                assert row.n_key == len(keys)
                checked += 1
    assert checked > 200
    words = table[(table["word"] != "") & (table["branch"] == "cond")]
    assert set(words["word"]) == {"a", "red", "ring", "cat"}


def test_masses_are_those_of_attention_mass(pipe: Any) -> None:
    from mmdit_probe import AttentionMass

    with probe(pipe, Contribution(), AttentionMass()) as seen:
        sample(pipe)
    by = ["prompt", "branch", "step", "layer", "head", "key", "span", "stream"]
    masses = seen[AttentionMass].table().query("query == 'image'").set_index(by)["mass"]
    own = seen[Contribution].table().query("head >= 0 and word == ''").set_index(by)["mass"]
    both = own.index.intersection(masses.index)
    assert len(both) == len(masses)
    assert (own[both] - masses[both]).abs().max() < 1e-5


def test_parts_add_up_over_keys_and_over_heads(pipe: Any) -> None:
    with probe(pipe, Contribution()) as seen:
        sample(pipe)
    table = seen[Contribution].table()
    by = ["prompt", "branch", "step", "layer", "head"]
    shares = table[table["word"] == ""].assign(part=lambda t: t["key"].astype(str) + t["span"].astype(str))
    keys = shares[shares["part"].isin(["imageall", "textall", "otherall"])]
    whole = shares[shares["part"] == "allall"].set_index(by)["share"]
    assert (keys.groupby(by, observed=True)["share"].sum() - whole).abs().max() < 1e-4
    heads = shares[(shares["part"] == "textall")].set_index(by[:-1])
    sums = heads[heads["head"] >= 0].groupby(by[:-1], observed=True)["share"].sum()
    assert (sums - heads[heads["head"] == -1]["share"]).abs().max() < 1e-4


def test_an_adapter_counts(pipe: Any) -> None:
    """The projection is read with all that is on it."""
    from peft import LoraConfig

    plain = pipe.transformer.transformer_blocks[0].attn.to_out[0].weight.clone()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=False))
    layer = pipe.transformer.transformer_blocks[0].attn.to_out[0]
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(linear_map(layer, plain).mT, plain + delta, atol=1e-5, rtol=0)
    assert delta.abs().max() > 0.01
    with probe(pipe, Contribution(rows="layer"), layers=0) as seen:
        sample(pipe)
    assert set(seen[Contribution].table()["head"]) == {-1}


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_families_are_exact_or_refused_by_name(name: str) -> None:
    case = case_of(name)
    checked = 0
    for layer, path in enumerate(joint_paths(case)):
        try:
            with probe(case.model, Contribution(rows="layer"), layers=layer) as seen:
                run(case.model, case.inputs)
        except UserError as error:
            assert f"layer {layer} ({path}" in str(error)
            continue
        table = seen[Contribution].table()
        module = case.model.get_submodule(path).to_out
        weight = (module[0] if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) else module).weight
        groups = {"all": (IMAGE, TEXT, OTHER, REFERENCE), "image": (IMAGE,), "text": (TEXT,), "other": (OTHER,)}
        layout, places = arranged(family_of(case.model).arrangement(case.inputs, case.model.config))
        groups |= {"reference": (REFERENCE,)} if layout.counts["reference"] else {}
        for at, (call, row, kinds) in enumerate(samples(case, path)):
            if places is None:  # references that are an input of their own are found as others
                kinds = torch.where((kinds == OTHER) & (layout.labels == REFERENCE), REFERENCE, kinds)
            queries = (kinds == IMAGE).nonzero()[:, 0].tolist()
            if call.query.shape[-2] != len(kinds):
                queries = list(range(call.query.shape[-2]))
            every = {
                key: parts(call, row, weight, queries, torch.isin(kinds, torch.tensor(of)).nonzero()[:, 0].tolist())
                for key, of in groups.items()
            }
            for key, own in ((key, of_heads.sum(0)) for key, of_heads in every.items()):
                found = table[(table["key"] == key) & (table["span"] == "all") & (table["stream"] == "")]
                found = found.iloc[at]
                values = [found["norm"], found["cosine"], found["share"]]
                assert values == pytest.approx(expected(own, every["all"].sum(0)), rel=1e-3, abs=1e-4), (path, at, key)
        checked += 1
    assert checked or name in REFUSED


REFUSED = ("joyimage_edit", "joyimage_edit_plus", "krea2")
"""Families without a layer whose contributions can be read: another place of the projection, or a gate before it."""


def test_small_weights_beside_a_large_bias_keep_their_digits_in_16_bits() -> None:
    layer = torch.nn.Linear(32, 32).bfloat16().requires_grad_(False)
    layer.weight.mul_(0.1)
    layer.bias.fill_(0.7)
    found = linear_map(layer, layer.bias)
    assert (found.mT - layer.weight.float()).norm() < 0.004 * layer.weight.float().norm()  # half a last digit


def test_an_edited_output_is_refused_where_it_is_edited(pipe: Any) -> None:
    """What the text writes there is no longer what the attention call says."""
    silent = Scale("image", "text", layers=[1], factor=0.0)
    with pytest.raises(UserError, match=r"layer 1 .* is edited"), probe(pipe, Contribution(), edits=silent):
        sample(pipe)
    with probe(pipe, Contribution(rows="layer"), layers=[0, 2], edits=silent) as seen:
        sample(pipe)
    assert set(seen[Contribution].table()["layer"]) == {0, 2}
    with probe(pipe, Contribution(rows="layer"), layers=[1], edits=silent.at(steps=[1]), steps=[0]) as seen:
        sample(pipe)
    assert set(seen[Contribution].table()["step"]) == {0}


def test_nothing_is_left_on_a_projection_that_was_not_reached(tiny_model: MMDiT) -> None:
    text, latents = tiny_model.encode_prompt("a red ring"), torch.randn(1, 4, 8, 8)
    projection = tiny_model.layers[0].module.to_out[0]
    observer = Contribution(rows="layer")
    for _ in range(2):
        with pytest.raises(ForwardEnded), probe(tiny_model, observer, layers=[0], to_end=False):
            tiny_model.denoise(latents, 0.5, text)
        assert not projection._forward_pre_hooks
    assert len(observer.table().query("key == 'all'")) == 2


def test_under_autocast_the_update_is_what_the_projection_gave(tiny_model: MMDiT) -> None:
    text, latents = tiny_model.encode_prompt("a red ring"), torch.randn(1, 4, 8, 8)
    projection = tiny_model.layers[1].module.to_out[0]
    given: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, inputs, output: given.append(output))
    blocks = JointBlocks([1], keep=("feat_proj",))
    with torch.autocast("cpu", torch.bfloat16), probe(tiny_model, Contribution(rows="layer"), blocks) as seen:
        tiny_model.denoise(latents, 0.5, text)
    handle.remove()
    whole = seen[Contribution].table().query("key == 'all' and layer == 1")["norm"].item()
    update = given[-1]  # the model's own call comes after the observers'
    assert torch.equal(blocks.kept[1]["feat_proj"], update.float())
    expected = (update.double() - projection.bias.double()).norm(dim=-1).mean()
    assert whole == pytest.approx(float(expected), rel=0.02)
