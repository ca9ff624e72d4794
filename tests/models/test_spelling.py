"""Token tables of stock pipelines, spelled back from what their encoders hand to the transformer.

The encoders are made transparent: without attention and MLPs a row of embeddings is its own token's, and the nearest
vector of the vocabulary names the token. So nothing here knows a template, a cut or a padding rule.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.prompts import traced
from mmdit_probe.models.families.registry import FAMILIES, Family, TextStream, family_of
from mmdit_probe.models.tokens import Token, TokenTable, fitted, stream_length, token_tables
from tests import tiny
from tests.families import TEXT
from tests.pipelines import FIBO_BLANK, LONGEST, PIPELINES, build, llm
from tests.video_pipelines import VIDEO_PIPELINES

QUOTED = re.compile(r"(?<=['\"])\w+(?=['\"])")
PROMPT = "a \"red\" ring, and 'cat'"
LENGTHS = {"hunyuan_video": 500, "hunyuan_video_framepack": 500, "ideogram4": 64} | dict.fromkeys(
    ("prx", "flux", "aura_flow", "bria", "chroma", "motif_video"), 40
)
"""Text lengths that hold the prompt and the template in a tokenizer of letters."""
NAMES = sorted({*PIPELINES, *VIDEO_PIPELINES})
LARGE = (
    "bria_fibo", "cogview4", "flux2", "hunyuan_image", "ideogram4", "krea2", "nucleus_image", "qwen_image", "z_image",
)  # fmt: skip
"""Families whose language models take prompts of more than 512 tokens."""


def transparent(encoder: Any) -> Any:
    """The encoder with every path between tokens cut: what is left is the embedding of each token, and norms."""
    embeddings = {id(module.weight) for module in encoder.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
            elif id(parameter) not in embeddings:
                parameter.zero_()
    return encoder


@functools.cache
def pipeline_of(name: str) -> Any:
    pipe = build(name)
    for stream in family_of(pipe.transformer).streams:
        for encoder in stream.encoders:
            transparent(getattr(pipe, encoder))
    return pipe


def encoded(name: str, prompts: list[str], negative: str = "ring") -> dict[str, Any]:
    """What the pipeline's own `encode_prompt` returns for prompts, by the names of the family's entry."""
    pipe = pipeline_of(name)
    family = family_of(pipe.transformer)
    options: dict[str, Any] = {
        "prompt": prompts, "prompt_2": None, "device": "cpu", "batch_size": len(prompts), "grid_h": 2, "grid_w": 2,
        "negative_prompt": [negative] * len(prompts), family.length_argument: length_of(name),
    }  # fmt: skip
    known = inspect.signature(type(pipe).encode_prompt).parameters
    with torch.no_grad():
        found = pipe.encode_prompt(**{name: of for name, of in options.items() if name in known})
    return dict(zip(family.encoded, found if isinstance(found, tuple) else (found,), strict=True))


def length_of(name: str) -> int:
    pipe = pipeline_of(name)
    family = family_of(pipe.transformer)
    lengths = [stream_length(pipe, family, stream, LENGTHS.get(name)) for stream in family.streams]
    return LENGTHS.get(name, max(lengths))


def spelled(encoder: Any, rows: Tensor, stride: int = 1) -> list[int]:
    """The token of every row [T, ...]; -1 for a row of zeros."""
    vocabulary = encoder.get_input_embeddings().weight.detach()
    width = vocabulary.shape[1]
    vectors = rows.flatten(1)[:, : width * stride : stride].float()
    near = nn.functional.normalize(vectors, dim=-1) @ nn.functional.normalize(vocabulary, dim=-1).T
    best = near.max(-1)
    assert bool(((best.values > 0.999) | (vectors.abs().amax(-1) == 0)).all())
    return torch.where(vectors.abs().amax(-1) == 0, -1, best.indices).tolist()


def check(pipe: Any, stream: TextStream, table: TokenTable, tokens: list[Token], ids: list[int]) -> None:
    """Every position of one stream is what its token of the table says."""
    tokenizer = getattr(pipe, stream.tokenizers[0])
    assert len(tokens) == len(ids)
    for token, token_id in zip(tokens, ids, strict=True):
        text = "" if token_id < 0 else tokenizer.decode([token_id])
        if token.kind == "word":
            # A bare mark of a word's start is spelled as nothing.
            assert text.strip() in ("", table.prompt[token.start : token.stop].strip()), token
        elif token.kind in ("bos", "eos"):
            # GLM's texts begin with two tokens of their own.
            known = getattr(tokenizer, f"{token.kind}_token_id")
            assert token_id in (tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"]) if known is None else [known])
        elif token.kind == "pad":
            assert token_id in (-1, tokenizer.pad_token_id)
        elif token.kind == "null":
            assert token_id == -1
        else:
            assert token.kind == "template" and token_id >= 0 and token_id != tokenizer.pad_token_id


def streams_of(name: str, prompts: list[str], result: dict[str, Any]) -> list[tuple[TokenTable, TextStream, Any, Any]]:
    """(table, stream, its tokens, its rows) of every prompt and stream."""
    pipe = pipeline_of(name)
    family: Family = family_of(pipe.transformer)
    tables = token_tables(pipe, family, prompts, LENGTHS.get(name, length_of(name)))
    found = []
    for row, table in enumerate(tables):
        for stream in family.streams:
            if stream.name == "llama_layer":
                continue
            tokens = [token for token in table.tokens if token.stream == stream.name]
            rows = result["glyphs" if stream.name == "byt5" and "glyphs" in result else "text"][row]
            if stream.name == "llama":
                rows = result["llama"][-1][row]  # of the last layer
            if name == "ideogram4":
                text = result["indicator"][row] == 3
                rows = rows[text]
            found.append((table, stream, tokens, rows))
    return found


def of_word(tokens: list[Token], word: str) -> list[int]:
    return [position for position, token in enumerate(tokens) if token.word == word]


@pytest.mark.parametrize("name", NAMES)
def test_words_and_kinds_are_those_of_the_embeddings(name: str) -> None:
    pipe = pipeline_of(name)
    for table, stream, tokens, rows in streams_of(name, [PROMPT], encoded(name, [PROMPT])):
        ids = spelled(getattr(pipe, stream.encoders[0]), rows, 13 if name == "ideogram4" else 1)
        check(pipe, stream, table, tokens, ids)
        words = {"a": "a", '"': '""', "red": "red", "ring": "ring", ",": ",", "and": "and", "cat": "cat"}
        if stream.name == "byt5":
            # The encoder of glyphs reads quotations only: HunyuanVideo 1.5 those in double marks, the other all.
            words = {"red": "red"} if name == "hunyuan_video15" else {"red": "red", "cat": "cat"}
            assert {token.word for token in tokens if token.word} == set(words)
        for word, spelling in words.items():
            spell = getattr(pipe, stream.tokenizers[0]).decode([ids[place] for place in of_word(tokens, word)])
            assert spell.replace(" ", "") == spelling, (stream.name, word, spell)
        assert table.truncated == {}


@pytest.mark.parametrize(
    "name", ["nucleus_image", "bria_fibo", "cogview4", "glm_image", "qwen_image", "krea2", "longcat_image"]
)
@pytest.mark.parametrize("prompts", [["ring", PROMPT], [PROMPT, "a cat"]])
def test_prompts_that_are_encoded_together(name: str, prompts: list[str]) -> None:
    pipe = pipeline_of(name)
    found = streams_of(name, prompts, encoded(name, prompts))
    for table, stream, tokens, rows in found:
        # What the pipeline adds afterwards has no token of its own in the table; a probe adds it.
        ids = spelled(getattr(pipe, stream.encoders[0]), rows)
        assert set(ids[len(tokens) :]) <= {-1}
        check(pipe, stream, table, tokens, ids[: len(tokens)])
        spell = pipe_text(pipe, stream, ids, tokens)
        said = "".join(QUOTED.findall(table.prompt)) if name == "glm_image" else table.prompt
        assert sorted(spell.replace(" ", "")) == sorted(said.replace(" ", ""))
    # Qwen-Image pads its embeddings afterwards.
    assert (len({len(tokens) for _, _, tokens, _ in found}) == 1) == (name != "qwen_image")


LONG = "a red ring, " * 130 + "then a house and a cat by the house"


@pytest.mark.parametrize("name", LARGE)
def test_template_and_user_text_of_a_long_prompt_are_told_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline_of(name)
    monkeypatch.setitem(LENGTHS, name, 1000)
    if name == "hunyuan_image":
        monkeypatch.setattr(pipe, "tokenizer_max_length", 1000)
    found = streams_of(name, [LONG], encoded(name, [LONG]))
    table, stream, tokens, rows = next(one for one in found if one[1].name == "llm")
    ids = spelled(getattr(pipe, stream.encoders[0]), rows, 13 if name == "ideogram4" else 1)
    check(pipe, stream, table, tokens, ids)
    kinds = [token.kind for token in tokens]
    assert kinds.count("word") >= 512 and table.truncated == {}
    # Every letter of the prompt is a word's, once; what else is read is the template.
    assert pipe_text(pipe, stream, ids, tokens).replace(" ", "") == LONG.replace(" ", "")
    assert ("template" in kinds) == (stream.wrap is not None or stream.tail is not None)
    decode = getattr(pipe, stream.tokenizers[0]).decode
    first = next(place for place, row in enumerate(table.tokens) if row.stream == "llm")
    for word, occurrence, spelling in (("cat", None, "cat"), ("house", 1, "house"), ("ring", 129, "ring")):
        places = table.word_spans(word, occurrence)["llm"]
        assert decode([ids[place - first] for place in places]).strip() == spelling
    assert table.word_spans("house", 1)["llm"][0] > table.word_spans("cat")["llm"][-1]


def pipe_text(pipe: Any, stream: TextStream, ids: list[int], tokens: list[Token]) -> str:
    words = [token_id for token_id, token in zip(ids, tokens, strict=False) if token.kind == "word"]
    tokenizer = getattr(pipe, stream.tokenizers[0])
    return "".join(tokenizer.decode([token_id]) for token_id in words)


@pytest.mark.parametrize("prompts", [[""], ["", "a red ring"]])
def test_an_empty_prompt_of_fibo_is_one_token_all_along(prompts: list[str]) -> None:
    pipe = pipeline_of("bria_fibo")
    rows = encoded("bria_fibo", prompts)["text"]
    table = token_tables(pipe, FAMILIES["bria_fibo"], prompts, 64)[0]
    ids = spelled(pipe.text_encoder, rows[0])
    # The prompts that are encoded with it, and the negative prompt, are longer; the negative prompt's zeros come last.
    assert ids[: len(table)] == [FIBO_BLANK] * len(table) and set(ids[len(table) :]) <= {-1}
    assert table.kinds == ["bos"] * len(table) and len(table) == (1 if len(prompts) == 1 else 3)


@pytest.mark.parametrize("name", ["krea2", "longcat_image", "hunyuan_image", "nucleus_image", "motif_video"])
def test_words_that_are_cut_off_are_named(name: str) -> None:
    pipe = pipeline_of(name)
    prompt = "ring " * 1200 + "house"
    result = encoded(name, [prompt])
    for table, stream, tokens, rows in streams_of(name, [prompt], result):
        if stream.name == "byt5":
            continue
        check(pipe, stream, table, tokens, spelled(getattr(pipe, stream.encoders[0]), rows))
        assert table.truncated[stream.name][-2:] == ("ring", "house")
        assert len(table.truncated[stream.name]) + len({t.word_index for t in tokens if t.word}) in (1201, 1202)


def test_framepack_cuts_its_pads_off() -> None:
    """Of one prompt it keeps the text that its mask keeps."""
    pipe, family = pipeline_of("hunyuan_video_framepack"), FAMILIES["hunyuan_video_framepack"]
    length = int(encoded("hunyuan_video_framepack", ["a red ring"])["mask"].sum())
    table = token_tables(pipe, family, ["a red ring"], length_of("hunyuan_video_framepack"))[0]
    assert "pad" in table.kinds
    kept = fitted(family, [table], length)[0]
    assert kept is not None and len(kept) == length and kept.word_spans("ring") == table.word_spans("ring")
    assert "pad" not in kept.kinds and fitted(family, [table], length - 1) == [None]


def test_quotations_of_longcat_are_read_letter_by_letter() -> None:
    pipe = pipeline_of("longcat_image")
    family = FAMILIES["longcat_image"]
    plain, quoted = token_tables(pipe, family, ["a red ring", "a 'red' ring"])
    assert [len(table.word_spans("red")["llm"]) for table in (plain, quoted)] == [1, 3]
    assert len(plain.word_spans("ring")["llm"]) == len(quoted.word_spans("ring")["llm"]) == 1


def test_cleaned_prompts_of_prx_keep_the_prompts_words() -> None:
    pipe = pipeline_of("prx")
    prompt = "A RED   Ring (see http://example.com/ring) and a CAT"
    table = token_tables(pipe, FAMILIES["prx"], [prompt], 40)[0]
    ids = spelled(pipe.text_encoder, encoded("prx", [prompt])["text"][0])
    for word in ("A", "RED", "Ring", "and", "a", "CAT"):
        places = of_word(list(table.tokens), word)
        assert pipe.tokenizer.decode([ids[place] for place in places]).strip() == word.lower()
    assert table.word_spans("ring", occurrence=0) != {} and table.positions(word="example") == []


def test_a_token_for_pictures_is_taken_out_of_a_prompt_of_flux2() -> None:
    from diffusers import Flux2Pipeline

    parts = dict(build("flux2").components)
    encoder = transparent(llm(parts["tokenizer"], layers=31))
    pipe = Flux2Pipeline(**{name: parts[name] for name in ("scheduler", "vae", "tokenizer", "transformer")},
                         text_encoder=encoder)  # fmt: skip
    prompt = "a [IMG]red[IMG] M [IMG]ring"
    with torch.no_grad():
        rows = pipe.encode_prompt([prompt], max_sequence_length=512)[0][0]
    table = token_tables(pipe, FAMILIES["flux2"], [prompt], 512)[0]
    ids = spelled(encoder, rows)
    check(pipe, FAMILIES["flux2"].streams[0], table, list(table.tokens), ids)
    words = [position for position, token in enumerate(table.tokens) if token.kind == "word"]
    assert pipe.tokenizer.decode([ids[position] for position in words]) == "a red M ring"
    assert [ids[place] for place in table.word_spans("M")["llm"]] == pipe.tokenizer(" M")["input_ids"]
    assert table.word_spans("IMG", missing_ok=True) == {}


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_a_textual_inversion_of_several_vectors_is_read_in_full(name: str) -> None:
    pipe = build(name)
    stream = FAMILIES[name].streams[0]
    tokenizer, encoder = (getattr(pipe, part) for part in (stream.tokenizers[0], stream.encoders[0]))
    pipe.load_textual_inversion(torch.randn(3, TEXT), token="<ring>", tokenizer=tokenizer, text_encoder=encoder)
    transparent(encoder)
    prompt = "a red <ring> and a cat"
    with torch.no_grad():
        rows = pipe.encode_prompt(prompt, None, max_sequence_length=40)[0][0]
    table = token_tables(pipe, FAMILIES[name], [prompt], 40)[0]
    ids = spelled(encoder, rows)
    for word, wanted in (("red", "red"), ("ring", "<ring>"), ("cat", "cat")):
        assert tokenizer.decode([ids[place] for place in table.word_spans(word)["t5"]]).strip() == wanted
    assert [table.kinds[ids.index(tokenizer.convert_tokens_to_ids(f"<ring>_{k}"))] for k in (1, 2)] == ["template"] * 2


def test_what_was_taken_from_a_prompt_is_traced() -> None:
    assert traced("a red ring", "A Red  Ring") == [("a red ", 0), ("ring", 7)]
    assert traced("x", "") == [("x", -1)] and traced("", "x") == []
    assert traced("a-b", "a—b") == [("a", 0), ("-", 1), ("b", 2)]


def test_bytes_have_the_places_of_their_characters() -> None:
    pipe = pipeline_of("hunyuan_image")
    prompt = 'the word "né"'
    table, stream, tokens, rows = streams_of("hunyuan_image", [prompt], encoded("hunyuan_image", [prompt]))[0]
    ids = spelled(pipe.text_encoder_2, rows)
    places = of_word(tokens, "né")
    assert stream.name == "byt5" and [tokens[place].start for place in places] == [10, 11, 11]
    assert pipe.tokenizer_2.decode([ids[place] for place in places]) == "né"
    assert table.positions(word="word", stream="byt5") == []
    nothing = token_tables(pipe, FAMILIES["hunyuan_image"], ["the word"])[0]
    assert {token.kind for token in nothing.tokens if token.stream == "byt5"} == {"null"}


def test_a_tokenizer_that_says_nothing_of_characters_is_refused() -> None:
    pipe = build("motif_video")
    fast = tiny.t5_tokenizer()

    class Slow:
        """A tokenizer without offsets, of words."""

        padding_side, model_max_length, is_fast, all_special_tokens = "right", 10, False, ["</s>"]

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": fast(text, **options)["input_ids"]}

    pipe.tokenizer = Slow()
    with pytest.raises(UserError, match="which characters a token stands for"):
        token_tables(pipe, FAMILIES["motif_video"], ["a red ring"], 10)


def test_hidream_pads_to_the_limits_of_its_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LENGTHS, "hidream", 600)
    pipe = pipeline_of("hidream")
    found = streams_of("hidream", [PROMPT], encoded("hidream", [PROMPT]))
    assert [len(tokens) for _, _, tokens, _ in found] == [LONGEST, 512]
    for table, stream, tokens, rows in found:
        check(pipe, stream, table, tokens, spelled(getattr(pipe, stream.encoders[0]), rows))
