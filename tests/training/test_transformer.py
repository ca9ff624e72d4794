"""The training forward against the stock one, what it may be aligned to, and the curriculum's arithmetic."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdit_probe.errors import UserError
from mmdit_probe.scenes import KINDS, NO_COLOUR, load_parser, scene
from mmdit_probe.scenes.captions import RELATIONS
from mmdit_probe.scenes.parser import aligned, read_maps, to_tensor
from mmdit_probe.scenes.world import COLOUR_NAMES
from training.align import READ, Alignment, feature_loss, reading, reading_loss
from training.features import BLOCK, HIDDEN, SceneEncoder, draw_hidden, patches
from training.flow import CURRICULUM, Phase, contrasted, draw_sigmas, fitted, optimizers, phase_at
from training.pool import pool
from training.text import CHANGES, ClipPair, Restorer, draw_captions, draw_negatives, hard_negatives
from training.transformer import AlignedTransformer, ExplicitJointAttention, TextEncoders, draw_kept


def live_model(alignment=None):
    torch.manual_seed(0)
    model = AlignedTransformer(alignment)
    for name, parameter in model.named_parameters():
        if "text_embedder" not in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def encode():
    torch.manual_seed(0)
    return TextEncoders(ClipPair().eval(), Restorer().encoder.eval(), torch.device("cpu"))


@pytest.mark.parametrize(("align", "heads"), [("none", 0), ("layer:4", 1), ("all:features", 8)])
def test_training_forward_is_the_stock_forward(encode, align, heads):
    model = live_model(Alignment.parse(align))
    text = encode(["a red ring on grass", ""])
    latents, times = torch.randn(2, 8, 8, 8), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        # The pooled text has no weight in the network, so any value must do.
        stock = model.transformer(latents, text, torch.randn(2, 128), times).sample
        assert torch.allclose(model(latents, text, times)[0], stock, atol=1e-5)
        model.transformer.set_attn_processor(ExplicitJointAttention())
        velocity, said = model(latents, text, times)
    assert torch.allclose(velocity, stock, atol=1e-4)
    assert [tuple(each.shape) for each in said] == [(2, 64, 22 if align == "layer:4" else 96)] * heads
    assert not torch.allclose(stock, torch.zeros_like(stock), atol=1e-2)


def test_a_head_reads_the_output_of_its_layer(encode):
    model, seen = live_model(Alignment.parse("layer:2")), []
    model.transformer.transformer_blocks[2].register_forward_hook(lambda *call: seen.append(call[-1][1]))
    with torch.no_grad():
        _, (said,) = model(torch.randn(1, 8, 8, 8), encode(["a ring"]), torch.tensor([500.0]))
        assert torch.equal(said, model.heads["2"](seen[0]))


def test_without_alignment_there_is_nothing_but_the_transformer():
    names = AlignedTransformer().state_dict()
    assert all(name.startswith("transformer.") for name in names)
    assert len(names) == len(AlignedTransformer().transformer.state_dict())


@pytest.mark.parametrize(
    ("text", "layers", "target"),
    [
        ("none", (), "labels"),
        ("layer:4", (4,), "labels"),
        ("layer:0:labels", (0,), "labels"),
        ("layer:7:features", (7,), "features"),
        ("all:labels", tuple(range(8)), "labels"),
        ("all:features", tuple(range(8)), "features"),
    ],
)
def test_alignments_are_read(text, layers, target):
    assert Alignment.parse(text) == Alignment(layers, target)


@pytest.mark.parametrize("text", ["", "all", "layer", "layer:8", "layer:-1", "layer:x", "none:labels", "all:masks"])
def test_what_is_no_alignment_is_refused(text):
    with pytest.raises(UserError, match=r"expected none, all:labels, .* N of 0\.\.7"):
        Alignment.parse(text)


def test_alignment_loss_is_lowest_at_the_reading():
    torch.manual_seed(0)
    target = torch.cat([torch.rand(2, 16, 15).softmax(-1), torch.rand(2, 16, 7).softmax(-1)], dim=-1)
    entropy = float(-(target * target.log()).sum(-1).mean())
    assert reading_loss(target.log(), target) == pytest.approx(entropy, rel=1e-5)
    off = target.log() + torch.randn_like(target)
    assert reading_loss(off, target) > entropy + 0.1
    # Blocks count alike: the loss of several heads is the mean of theirs.
    both = Alignment.parse("all:labels").loss([target.log(), off], target)
    assert both == pytest.approx((entropy + float(reading_loss(off, target))) / 2, rel=1e-5)


def test_feature_loss_is_one_minus_the_cosine():
    target = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    said = torch.tensor([[[6.0, 8.0], [0.0, 5.0]]])  # cosines 1 and 0
    assert feature_loss(said, target) == pytest.approx(0.5)


def test_the_reading_of_a_token_is_that_of_its_pixels():
    item = scene("val", 0)
    read = reading(load_parser(), 4)(to_tensor([item.image]))[0]
    assert read.shape == (256, READ)
    torch.testing.assert_close(read[:, :15].sum(-1), torch.ones(256))
    torch.testing.assert_close(read[:, 15:].sum(-1), torch.ones(256))
    classes = F.one_hot(torch.from_numpy(item.classes.astype(np.int64)), 15).movedim(-1, 0)[None].float()
    shares = F.avg_pool2d(classes, 4).flatten(2)[0].T
    pure = shares.amax(-1) == 1
    assert float((read[pure, :15].argmax(-1) == shares[pure].argmax(-1)).float().mean()) > 0.95
    empty = F.avg_pool2d(torch.from_numpy(item.colours == NO_COLOUR)[None, None].float(), 4).flatten() == 1
    assert read[empty, -1].mean() > 0.95 and read[~empty & pure, -1].mean() < 0.2


def test_hidden_tokens_are_blocks_that_the_encoder_cannot_see():
    torch.manual_seed(0)
    hidden = draw_hidden(3, 8)
    blocks = hidden.view(3, 4, BLOCK, 4, BLOCK).float().mean((2, 4))
    assert set(blocks.unique().tolist()) == {0.0, 1.0}
    assert blocks.flatten(1).sum(1).tolist() == [round(HIDDEN * 16)] * 3
    encoder = SceneEncoder().eval()
    nn.init.normal_(encoder.hidden)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    mask = F.interpolate(hidden.view(3, 1, 8, 8).float(), scale_factor=4)
    with torch.no_grad():
        seen = encoder(images, hidden)
        assert torch.allclose(encoder(torch.where(mask == 1, -images, images), hidden), seen, atol=1e-5)
        assert not torch.allclose(encoder(torch.where(mask == 0, -images, images), hidden), seen, atol=1e-2)
        assert seen.shape == (3, 64, 96) and encoder(torch.rand(1, 3, 48, 48)).shape == (1, 144, 96)
    # Tokens lie row by row, as the latents of the transformer do: pixel (5, 9) belongs to token 1 * 8 + 2.
    images[0, :, 5, 9] = 7
    assert patches(images)[0].eq(7).any(-1).nonzero().flatten().tolist() == [10]


def test_dropped_encoders_are_zero_rows(encode):
    kept = encode(["a red ring"])
    assert kept.shape == (1, 48, 128) and (kept.abs().sum(-1) > 0).all()
    without_t5 = encode(["a red ring"], draw_kept(1, {"clip_l": 0.0, "clip_g": 0.0, "t5": 1.0}))
    assert torch.equal(without_t5[:, :24], kept[:, :24]) and (without_t5[:, 24:] == 0).all()
    without_g = encode(["a red ring"], draw_kept(1, {"clip_l": 0.0, "clip_g": 1.0, "t5": 0.0}))
    assert (without_g[:, :24, 64:] == 0).all() and torch.equal(without_g[:, :24, :64], kept[:, :24, :64])


@pytest.mark.parametrize("align", ["none", "all:labels"])
def test_every_parameter_has_exactly_one_optimizer(align):
    model = live_model(Alignment.parse(align))
    owned = [id(p) for o in optimizers(model, 1e-3, 1e-3) for g in o.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == {id(p) for p in model.parameters()}


def test_noise_levels_are_shifted_by_three():
    torch.manual_seed(0)
    sigmas = draw_sigmas(20000)
    assert float(sigmas.median()) == pytest.approx(0.75, abs=0.01)
    assert float(sigmas.min()) > 0 and float(sigmas.max()) < 1


def test_phases_follow_each_other():
    curriculum = (Phase("single", 3, 8), Phase("scenes", 2, 4))
    assert [phase_at(step, curriculum).pool for step in range(7)] == ["single"] * 3 + ["scenes"] * 4


def test_fewer_steps_shrink_every_phase_and_more_lengthen_the_last():
    total = sum(phase.steps for phase in CURRICULUM)
    assert fitted(CURRICULUM, None) == fitted(CURRICULUM, total) == CURRICULUM
    assert fitted(CURRICULUM, total + 200)[-1].steps == CURRICULUM[-1].steps + 200
    three = (Phase("single", 800, 96), Phase("pair", 1000, 64, wrong=8), Phase("scenes", 4000, 48))
    assert [phase.steps for phase in fitted(three, 1450)] == [200, 250, 1000]
    assert fitted(three, 1450)[1] == Phase("pair", 250, 64, wrong=8)
    for steps in range(1, 30):
        assert sum(phase.steps for phase in fitted(CURRICULUM, steps)) == steps


def test_a_hard_negative_is_not_true_of_its_picture(tmp_path):
    data = pool(tmp_path, "val", 60, workers=1)
    negatives = hard_negatives(data)
    assert set(negatives) == set(CHANGES) and min(map(len, negatives.values())) > 10
    words = {"opposite_relation": set(RELATIONS) | {"left", "right"}, "wrong_count": {"two", "three", "four"}}
    for change, some in negatives.items():
        for row, caption, wrong in some:
            reading = read_maps(np.asarray(data.classes[row]), np.asarray(data.colours[row]))
            assert caption in data.captions[row] and not aligned(wrong, reading)
            turned = {word for a, b in zip(caption.split(), wrong.split(), strict=True) if a != b for word in (a, b)}
            assert turned and turned <= words.get(change, set(COLOUR_NAMES))


def test_every_change_is_drawn_as_often_as_it_says():
    negatives = {change: [(k, change, "") for k in range(3)] for change in CHANGES}
    torch.manual_seed(0)
    drawn = draw_negatives(negatives, 3000)
    for change, odds in CHANGES.items():
        some = [row for row, caption, _ in drawn if caption == change]
        assert len(some) / 3000 == pytest.approx(odds / sum(CHANGES.values()), abs=0.03) and set(some) == {0, 1, 2}
    assert draw_negatives(negatives, 0) == []
    only = {"wrong_count": [(7, "two rings", "three rings")]}
    assert draw_negatives(only, 2) == only["wrong_count"] * 2


def test_the_excess_of_a_wrong_caption_lowers_the_loss_until_it_is_large():
    error = torch.tensor([0.5, 0.7, 0.9, 0.5, 1.7], requires_grad=True)
    loss, numbers = contrasted(error, Phase("pair", 1, 3, wrong=2))
    # The first picture's excess is 0 (log 2), the second's is 1 (nothing left to gain).
    assert float(loss.detach()) == pytest.approx(0.7 + 0.1 * np.log(2) / 2, rel=1e-5)
    assert numbers == pytest.approx({"flow": 0.7, "excess": 0.5})
    loss.backward()
    assert error.grad.tolist() == pytest.approx([1 / 3 + 2.5, 1 / 3, 1 / 3, -2.5, 0], rel=1e-5, abs=1e-6)
    assert contrasted(torch.tensor([1.0, 2.0]), Phase("pair", 1, 2)) == (1.5, {"flow": 1.5})


def test_pool_holds_the_scenes_and_their_captions(tmp_path):
    data = pool(tmp_path, "val", 4, workers=1)
    again = pool(tmp_path, "val", 4, workers=1)
    assert len(data) == 4 and np.array_equal(data.images[2], scene("val", 2).image)
    assert np.array_equal(again.classes, data.classes) and again.captions == data.captions
    torch.manual_seed(0)
    drawn = draw_captions(data, [0, 1, 2, 3] * 50, empty=0.5)
    assert 60 < drawn.count("") < 140
    assert {text for text in drawn if text} <= {text for row in data.captions for text in row}
    assert len(data.captions[0]) == len(KINDS)
