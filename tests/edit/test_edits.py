"""Every edit inside real pipelines against its dense counterpart in float64, and what it must leave alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from mmdit_probe import AttentionMass, probe
from mmdit_probe.attention import reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.edit import Blur, EqualBudget, GridBlur, Mean, Scale, ScaleText, Swap
from mmdit_probe.edit.control import rotations
from mmdit_probe.edit.edit import Edit, Place, _words
from mmdit_probe.edit.edits import OtherText, blur_matrix, taps
from mmdit_probe.errors import ProbeWarning, RunError, UserError
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.layout import Layout
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.tokens import token_tables
from mmdit_probe.observe.observer import Observer
from tests import tiny
from tests.observe.situations import OWN_ATTENTION, OwnAttention, forward, model_of, own_processors, rolled

IMAGE, T = 16, tiny.CLIP_LENGTH + tiny.T5_LENGTH
N = IMAGE + T
TEXT = slice(IMAGE, N)
PROMPT = "a red ring and a cat"
LAYER = 1


def sample(pipe: Any, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"} | options
    return pipe(
        PROMPT, max_sequence_length=tiny.T5_LENGTH, generator=torch.Generator().manual_seed(1), **options
    ).images


@dataclass
class Seen:
    """q, k, v of the edited layer at the first step, and the output the model went on with. [B, H, N, D] float64."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor

    @property
    def attention(self) -> torch.Tensor:
        return reference.probabilities(self.query, self.key)


def kept(edit: Any, variant: str = "sd3", steps: int = 1, **options: Any) -> list[Seen]:
    """What the edited layer did at every step, seen by an observer: calls before the edit, outputs after it."""
    pipe = tiny.pipeline(variant)
    calls: list[Seen] = []

    class Keep(Observer):
        def observe(self, seen: Any) -> None:
            call = seen.call
            calls.append(Seen(*(x.double().clone() for x in (call.query, call.key, call.value, seen.output))))

    with probe(pipe, Keep(), layers=[LAYER], edits=edit):
        sample(pipe, num_inference_steps=steps, **options)
    return calls


def under(edit: Any, variant: str = "sd3", **options: Any) -> Seen:
    """What the edited layer did at the first step."""
    return kept(edit, variant, **options)[0]


def dense_blur(seen: Seen, matrix: torch.Tensor, positions: list[int] | None = None) -> torch.Tensor:
    """(A with its I2T columns blurred) V, the N x N way."""
    attention = seen.attention.clone()
    columns = [IMAGE + p for p in (positions if positions is not None else range(T))]
    block = attention[..., :IMAGE, :][..., columns]
    edited = attention.clone()
    for k, column in enumerate(columns):
        edited[..., :IMAGE, column] = (block * matrix[k]).sum(-1)
    return edited @ seen.value


@pytest.mark.parametrize("variant", ["sd3", "sd35", "no-t5"])
@pytest.mark.parametrize("border", ["reflect", "symmetric", "replicate"])
def test_blur_is_the_dense_blur_of_the_probabilities(variant: str, border: Any) -> None:
    seen = under(Blur("image", "text", layers=[LAYER], border=border), variant)
    matrix = blur_matrix(T, taps(9, 5), border)
    expected = dense_blur(seen, matrix)
    assert (seen.output - expected).abs().max() < 1e-5
    assert (seen.output - seen.attention @ seen.value).abs().max() > 1e-3  # it is a blur
    if border == "reflect":  # and it is R along tokens, not its transpose: they differ at the ends
        assert (seen.output - dense_blur(seen, matrix.T)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("edit", "missed"),
    [
        (Blur(words=["dog"]), r"words \['dog'\]"),
        (EqualBudget(Scale(factor=2, spans=["vision"])), r"spans \['vision'\]"),
    ],
)
def test_an_edit_that_found_nothing_to_edit_is_told(edit: Any, missed: str) -> None:
    pipe = tiny.pipeline()
    told = pytest.warns(ProbeWarning, match=f"edited nothing: no sample of a call had its {missed}")
    with told, probe(pipe, edits=[edit, Blur(words=["cat"])]) as run:
        sample(pipe)
    assert len(run.notes) == 1
    with probe(pipe, edits=[Blur(sigma=0), Blur().no_op(), Mean(words=["cat"])]) as quiet:  # two are to change nothing
        sample(pipe)
    assert quiet.notes == []


@pytest.mark.parametrize("wrong", [lambda output: output[:, :, :1], lambda output: None])
def test_an_edit_of_one_s_own_gives_the_shape_of_the_output(wrong: Any) -> None:
    class Own(Edit):
        def attend(self, call: SDPACall, place: Place, proceed: Any) -> Any:
            return wrong(proceed(call))

    with pytest.raises(UserError, match=rf"^Own.attend gave .*; expected a tensor of shape \(2, {tiny.HEADS}, {N}, "):
        under(Own(layers=[LAYER]))


def test_text_queries_read_plain_values() -> None:
    seen = under(Blur("image", "text", layers=[LAYER]))
    plain = seen.attention @ seen.value
    assert (seen.output - plain)[:, :, TEXT].abs().max() < 1e-5


def test_blur_within_one_stream_and_within_one_span_kind() -> None:
    clip = list(range(tiny.CLIP_LENGTH))
    seen = under(Blur("image", "text", layers=[LAYER], streams=("clip",)))
    expected = dense_blur(seen, blur_matrix(len(clip), taps(9, 5), "reflect"), clip)
    assert (seen.output - expected).abs().max() < 1e-5

    tables = token_tables(tiny.pipeline(), FAMILIES["sd3"], ["", PROMPT], tiny.T5_LENGTH)
    seen = under(Blur("image", "text", layers=[LAYER], spans=("word",), kernel=3, sigma=1))
    words = tables[1].positions(kind="word")
    rows = dense_blur(seen, blur_matrix(len(words), taps(1, 3), "reflect"), words)
    assert (seen.output[1] - rows[1]).abs().max() < 1e-5
    assert (seen.output[0] - (seen.attention @ seen.value)[0]).abs().max() < 1e-5  # no words, no change


def test_blur_before_the_softmax_keeps_rows_normalised() -> None:
    seen = under(Blur("image", "text", layers=[LAYER], where="logits"))
    logits = reference.logits(seen.query, seen.key)
    matrix = blur_matrix(T, taps(9, 5), "reflect")
    logits[..., :IMAGE, TEXT] = logits[..., :IMAGE, TEXT] @ matrix.T
    assert (seen.output - logits.softmax(-1) @ seen.value).abs().max() < 1e-5


@pytest.mark.parametrize("where", ["probabilities", "logits"])
def test_grid_blur_is_the_dense_blur_of_each_keys_map(where: Any) -> None:
    seen = under(GridBlur("image", "text", layers=[LAYER], sigma=1, kernel=3, border="symmetric", where=where))
    one = blur_matrix(4, taps(1, 3), "symmetric")
    grid = torch.kron(one, one)
    scores = seen.attention if where == "probabilities" else reference.logits(seen.query, seen.key)
    scores[..., :IMAGE, TEXT] = grid @ scores[..., :IMAGE, TEXT]
    attention = scores if where == "probabilities" else scores.softmax(-1)
    assert (seen.output - attention @ seen.value).abs().max() < 1e-5


@pytest.mark.parametrize(
    "edit",
    [Blur("image", "text", layers=[LAYER]), GridBlur("image", "text", layers=[LAYER], sigma=1), Scale(layers=[LAYER])],
)
def test_renormalised_rows_sum_to_one(edit: Edit) -> None:
    seen = under(edit.at(renormalise=True))
    attention = seen.attention.clone()
    if isinstance(edit, Blur):
        attention[..., :IMAGE, TEXT] = attention[..., :IMAGE, TEXT] @ blur_matrix(T, taps(9, 5), "reflect").T
    elif isinstance(edit, GridBlur):
        one = blur_matrix(4, taps(1, 5), "reflect")
        attention[..., :IMAGE, TEXT] = torch.kron(one, one) @ attention[..., :IMAGE, TEXT]
    else:
        attention[..., :IMAGE, TEXT] = 0
    attention = attention / attention.sum(-1, keepdim=True)
    assert (seen.output - attention @ seen.value).abs().max() < 1e-5


def test_image_keys_are_blurred_in_two_dimensions() -> None:
    seen = under(Blur("text", "image", layers=[LAYER], sigma=1, kernel=3))
    one = blur_matrix(4, taps(1, 3), "reflect")
    attention = seen.attention.clone()
    attention[..., TEXT, :IMAGE] = attention[..., TEXT, :IMAGE] @ torch.kron(one, one).T
    assert (seen.output - attention @ seen.value).abs().max() < 1e-5


def test_zero_mean_and_swap() -> None:
    seen = under(Scale(layers=[LAYER], factor=0.25))
    attention = seen.attention.clone()
    attention[..., :IMAGE, TEXT] *= 0.25
    assert (seen.output - attention @ seen.value).abs().max() < 1e-5

    seen = under(Mean(layers=[LAYER]))
    attention = seen.attention.clone()
    attention[..., :IMAGE, TEXT] = attention[..., :IMAGE, TEXT].mean(-1, keepdim=True)
    assert (seen.output - attention @ seen.value).abs().max() < 1e-5

    seen = under(Swap(layers=[LAYER], words=("red", "cat")))
    table = token_tables(tiny.pipeline(), FAMILIES["sd3"], [PROMPT], tiny.T5_LENGTH)[0]
    order = list(range(N))
    for stream, positions in table.word_spans("red").items():
        for a, b in zip(positions, table.word_spans("cat").get(stream, []), strict=False):
            order[IMAGE + a], order[IMAGE + b] = order[IMAGE + b], order[IMAGE + a]
    assert order != list(range(N))
    for swapped in (
        seen.attention @ seen.value[:, :, order],  # values exchanged
        reference.probabilities(seen.query, seen.key[:, :, order]) @ seen.value,  # keys exchanged: the same
    ):
        assert (seen.output[1, :, :IMAGE] - swapped[1, :, :IMAGE]).abs().max() < 1e-5
    assert (seen.output - seen.attention @ seen.value)[1, :, :IMAGE].abs().max() > 1e-3


def test_heads_and_branches_not_named_keep_the_stock_output() -> None:
    seen = under(Blur("image", "text", layers=[LAYER], heads=1, branches=("cond",)))
    plain = seen.attention @ seen.value
    blurred = dense_blur(seen, blur_matrix(T, taps(9, 5), "reflect"))
    assert (seen.output[0] - plain[0]).abs().max() < 1e-5
    assert (seen.output[1, 0] - plain[1, 0]).abs().max() < 1e-5
    assert (seen.output[1, 1] - blurred[1, 1]).abs().max() < 1e-5
    assert (blurred[1, 1] - plain[1, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "edit",
    [
        Blur("image", "text", sigma=0),
        Blur("image", "text", kernel=1),
        GridBlur("image", "text", sigma=0),
        Scale("image", "text", factor=1.0),
        Swap(words=("blue", "house")),
        Blur("image", "text", branches=("perturbed",)),
        EqualBudget(Blur("image", "text", sigma=0)),
        EqualBudget(Blur("image", "text", sigma=0), kind="noise"),
        EqualBudget(Blur("image", "text", branches=("perturbed",))),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_no_op_settings_are_bitwise_neutral(pipe: Any, edit: Any) -> None:
    stock = sample(pipe)
    with probe(pipe, edits=edit):
        assert torch.equal(sample(pipe), stock)
    assert torch.equal(sample(pipe), stock)


def test_steps_are_addressed(pipe: Any) -> None:
    stock = sample(pipe)
    with probe(pipe, edits=Blur("image", "text", steps=5)), pytest.raises(UserError, match="step 5"):
        sample(pipe)
    images = {}
    for steps in (0, 1, "all", "last"):
        with probe(pipe, edits=Blur("image", "text", steps=steps)):
            images[steps] = sample(pipe)
    assert torch.equal(images[1], images["last"])
    distinct = [stock, images[0], images[1], images["all"]]
    assert all(not torch.equal(a, b) for k, a in enumerate(distinct) for b in distinct[:k])


def test_a_recorder_sees_the_call_before_the_edit(pipe: Any) -> None:
    with probe(pipe, AttentionMass()) as run:
        sample(pipe, num_inference_steps=1)
    stock = run[AttentionMass].table()
    with probe(pipe, AttentionMass(), edits=Blur("image", "text", layers=[0])) as run:
        sample(pipe, num_inference_steps=1)
    edited = run[AttentionMass].table()
    for layer, same in ((0, True), (1, False)):
        one, two = (table[table["layer"] == layer]["mass"].to_numpy() for table in (stock, edited))
        assert (abs(one - two).max() < 1e-6) == same


@pytest.mark.parametrize("family", ["sd3", "krea2", "ideogram4"])
def test_heads_are_not_counted_in_a_call_of_some_of_them(family: str) -> None:
    model, by_heads = model_of(family)(), OwnAttention(OWN_ATTENTION["by heads"][0])
    scaled = probe(model, edits=Scale(factor=0.0, heads=[0]))  # it was the first head of each call
    with pytest.raises(RunError, match="attention for 1 of its heads alone"), by_heads, scaled:
        forward(model)


def test_a_processor_that_joins_tokens_in_another_order_is_refused() -> None:
    model = model_of("sd3")()
    own_processors(rolled)(model)
    with pytest.raises(RunError, match=r"layer 0 .* OwnProcessor.* in another order"), probe(model, edits=Blur()):
        forward(model)


def test_edits_of_one_layer_compose_in_order() -> None:
    blur, half = Blur("image", "text", layers=[LAYER]), Scale(layers=[LAYER], factor=0.5)
    seen = under([blur, half])
    attention = seen.attention.clone()
    attention[..., :IMAGE, TEXT] = 0.5 * attention[..., :IMAGE, TEXT] @ blur_matrix(T, taps(9, 5), "reflect").T
    assert (seen.output - attention @ seen.value).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["rotation", "noise"])
def test_the_control_moves_each_token_as_far_and_elsewhere(kind: Any) -> None:
    blur = Blur("image", "text", layers=[LAYER], heads=0)
    control = EqualBudget(blur, seed=3, kind=kind)
    edited, controlled = under(blur), under(control)
    plain = controlled.attention @ controlled.value
    wanted, got = (edited.output - plain).norm(dim=-1), (controlled.output - plain).norm(dim=-1)
    assert torch.allclose(wanted, got, atol=1e-5)
    assert wanted[:, 0, :IMAGE].mean() > 1e-3
    assert wanted[:, 1].max() < 1e-5
    assert not torch.allclose(edited.output, controlled.output, atol=1e-3)
    again, other = under(control), under(replace(control, seed=7))
    assert torch.equal(again.output, controlled.output)
    assert not torch.allclose(other.output, controlled.output, atol=1e-3)


def test_the_rotation_is_one_orthogonal_matrix_per_head_for_all_tokens_samples_and_steps() -> None:
    """Against float64: the dense change, times the matrix that the change of all tokens and steps determines."""
    blur = Blur("image", "text", layers=[LAYER], sigma=2, kernel=9)
    matrix = blur_matrix(T, taps(2, 9), "reflect")
    before, after = [], []
    for seen in kept(EqualBudget(blur, seed=3), steps=6):
        plain = seen.attention @ seen.value
        before.append((dense_blur(seen, matrix) - plain)[:, :, :IMAGE])
        after.append((seen.output - plain)[:, :, :IMAGE])
    change, turned = (torch.cat(parts).transpose(0, 1).flatten(1, 2) for parts in (before, after))  # [H, all tokens, D]
    assert torch.allclose(
        turned @ turned.mT, change @ change.mT, atol=1e-5
    )  # every norm, and every angle, is kept (largest: 5)
    turn = torch.linalg.lstsq(change, turned).solution  # [H, D, D]
    assert torch.linalg.matrix_rank(change).tolist() == [change.shape[-1]] * len(change)
    assert torch.allclose(turn @ turn.mT, torch.eye(change.shape[-1]).double(), atol=1e-3)
    assert (change @ turn - turned).abs().max() < 1e-5
    assert (turn[0] - turn[1]).abs().max() > 0.1  # another one in each head


def test_rotations_are_orthogonal_and_uniform() -> None:
    turns = rotations(400, 8, torch.Generator().manual_seed(0))
    assert torch.allclose(turns @ turns.mT, torch.eye(8).double(), atol=1e-12)
    assert turns.mean(0).abs().max() < 5 * (1 / 8 / 400) ** 0.5  # also on the diagonal, which plain QR makes negative
    assert 0.4 < (torch.linalg.det(turns) > 0).double().mean() < 0.6


@pytest.mark.parametrize("kind", ["rotation", "noise"])
def test_the_control_of_a_sample_is_the_same_alone_and_in_a_batch(kind: Any) -> None:
    model = MMDiT(tiny.pipeline())
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    control = EqualBudget(Blur("image", "text", layers=[LAYER]), seed=1, kind=kind)

    def denoised(rows: slice) -> torch.Tensor:
        prompts = ["a red ring", "a cat", "red"][rows]
        with probe(model, edits=control):
            return model.denoise(latents[rows], 0.5, model.encode_prompt(prompts))

    together = denoised(slice(None))
    for row in range(3):
        torch.testing.assert_close(denoised(slice(row, row + 1))[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rotation", "noise"])
def test_every_image_has_a_direction_of_its_own_whatever_its_batch(kind: Any) -> None:
    """The same latents and text under three seeds: images of one seed move alike, others elsewhere. One direction for
    all would make them equal, and five in turn seeds 4 and 9."""
    model = MMDiT(tiny.pipeline())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    control = EqualBudget(Blur("image", "text", layers=[LAYER]), seed=1, kind=kind)

    def denoised(seeds: list[int]) -> torch.Tensor:
        with probe(model, edits=control):
            text = model.encode_prompt(["a cat"] * len(seeds))
            return model.denoise(latents.expand(len(seeds), -1, -1, -1), 0.5, text, seeds=seeds)

    together = denoised([4, 9, 4, 5])
    torch.testing.assert_close(together[0], together[2], atol=1e-6, rtol=0)
    for place, seed in ((0, 4), (1, 9), (3, 5)):
        torch.testing.assert_close(denoised([seed])[0], together[place], atol=1e-5, rtol=1e-4)
        others = [other for other in (0, 1, 3) if other != place]
        assert min((together[place] - together[other]).abs().max() for other in others) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blur("image", "txt"), "text"),
        (lambda: Blur(border="mirror"), "border"),
        (lambda: Blur(where="after"), "place"),
        (lambda: Blur(branches=("con",)), "cond"),
        (lambda: Blur(spans=("words",)), "word"),
        (lambda: Blur("text", "image", spans=("word",)), "image tokens"),
        (lambda: GridBlur("text", "text"), "image queries"),
        (lambda: Swap(words=("a",)), "two words"),
        (lambda: Blur(words="red ring"), r"words is 'red ring': expected a list, such as \['red ring'\]"),
        (lambda: Scale(words={"a red ring": "ring"}), "words is 'ring': expected a list"),
        (lambda: Blur(spans="word"), "spans is 'word': expected a list"),
        (lambda: Blur(branches=3), "branches is 3: expected a list of texts"),
        (lambda: Blur(words=[3]), r"words is \[3\]: expected a list of texts"),
        (lambda: Blur(sigma="9"), "blur sigma '9': expected a finite number from 0"),
        (lambda: Blur(kernel=None), "blur kernel None: expected a finite number from 1"),
        (lambda: Scale(factor=float("nan")), "finite"),
        (lambda: Blur(sigma=float("inf")), "finite"),
        (lambda: EqualBudget(Blur(), kind="rotated"), "rotation"),  # type: ignore[arg-type]
        (lambda: EqualBudget(ScaleText()), "no equal-budget control of ScaleText"),  # type: ignore[arg-type]
    ],
)
def test_bad_edits_are_refused_when_made(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_unknown_streams_name_those_there_are(pipe: Any) -> None:
    with probe(pipe, edits=Blur(streams=("clip3",))), pytest.raises(UserError, match="clip"):
        sample(pipe)


def test_whole_rows_are_computed_once_and_like_the_addressed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attention call's worth of queries; the text rows and the edited ones have the bits of the slower way."""
    asked: list[int] = []
    stock = SDPACall.stock

    def counted(call: SDPACall) -> torch.Tensor:
        asked.append(call.query.shape[-2])
        return stock(call)

    monkeypatch.setattr(SDPACall, "stock", counted)
    blur = Blur("image", "text", layers=[LAYER])
    spliced = under(blur)
    assert sorted(asked) == sorted([IMAGE, T])
    asked.clear()
    monkeypatch.setattr(Blur, "by_rows", False)
    whole = under(blur)
    assert asked == [IMAGE + T] * 2
    assert torch.equal(spliced.output, whole.output)


@pytest.mark.parametrize(
    ("prompt", "named", "characters"),
    [
        ("a café", "cafe\u0301", (2, 6)),
        ("boy’s cat", "boy's", (0, 5)),
        ("red, ring", "red, ring", (0, 9)),
        ("a ring, red", "red ring", (0, 0)),  # both words, and not the phrase
        ("a string", "ring", (0, 0)),
        ("一只猫", "猫", (2, 3)),
    ],
)
def test_words_are_found_in_a_prompt_as_maps_find_them(
    pipe: Any, prompt: str, named: str, characters: tuple[int, int]
) -> None:
    """One that was not found left the call as it was, in silence."""
    (table,) = token_tables(pipe, FAMILIES["sd3"], [prompt], tiny.T5_LENGTH)
    start, stop = characters
    expected = [token.start < stop and start < token.stop and token.start >= 0 for token in table.tokens]
    assert _words([named], table).tolist() == expected
    assert any(expected) == (stop > 0)


def test_another_text_reads_under_a_mask_of_two_axes() -> None:
    """Torch takes a mask [queries, keys] that holds for all samples."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.rand(5, 5, generator=generator) > 0.3
    mask[:, 0] = True
    every = torch.ones(2, dtype=torch.bool)
    layout = Layout.from_counts([("image", 3), ("text", 2)])
    place = Place(layout, every, every, torch.arange(5) < 3, torch.ones(2, 2, dtype=torch.bool), [])
    found = OtherText().attend(SDPACall(query, key, value, mask), place, lambda call: call.stock())
    swapped = [torch.cat([x[:, :, :3], x.flip(0)[:, :, 3:]], 2).double() for x in (key, value)]
    expected = reference.probabilities(query, swapped[0], mask) @ swapped[1]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["rotation", "noise"])
def test_the_control_of_an_image_is_the_same_in_the_second_run_of_a_probe(kind: Any) -> None:
    model = MMDiT(tiny.pipeline())
    options: dict[str, Any] = {"steps": 2, "guidance": 4.0, "output_type": "latent"}
    control = EqualBudget(Blur("image", "text", layers=[LAYER]), kind=kind)
    with probe(model, edits=control):
        together = model.generate(["a cat", "a red ring"], seed=[3, 4], **options)
    with probe(model, edits=control):
        apart = [model.generate(p, seed=s, **options)[0] for p, s in (("a cat", 3), ("a red ring", 4))]
    torch.testing.assert_close(torch.stack(apart), together, atol=1e-3, rtol=1e-3)
    stock = model.generate("a red ring", seed=4, **options)[0]
    assert (stock - apart[1]).abs().max() > 1e-2
