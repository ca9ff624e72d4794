"""Token tables: from the real tokenizer classes, by character offsets."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmdit_probe.data.words import folded
from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.tokens import Token, TokenTable, fitted, token_tables, unknown_table
from tests import tiny
from tests.pipelines import llm_tokenizer

CLIP, T5 = tiny.CLIP_LENGTH, tiny.T5_LENGTH


def table(pipe: Any, prompt: str) -> TokenTable:
    return token_tables(pipe, FAMILIES["sd3"], [prompt], T5)[0]


def test_kinds_of_a_plain_prompt(pipe: Any) -> None:
    found = table(pipe, "a red ring")
    assert found.kinds[:CLIP] == ["bos", "word", "word", "word", "eos"] + ["pad"] * 7
    # T5 has no BOS and splits "ring" in two.
    assert found.kinds[CLIP:] == ["word"] * 4 + ["eos"] + ["pad"] * 5
    assert found.streams == ["clip"] * CLIP + ["t5"] * T5
    assert found.positions(kind="word", stream="t5") == [12, 13, 14, 15]


def test_positions_line_up_with_the_embedding_rows(pipe: Any) -> None:
    """The table's positions are the rows of the pipeline's own embeddings: changing one word changes exactly them (T5
    and
    CLIP are contextual, so only the rows before the word are bitwise safe in CLIP's causal encoder)."""
    one = pipe.encode_prompt("a red ring", None, None, max_sequence_length=T5, do_classifier_free_guidance=False)[0]
    two = pipe.encode_prompt("a red cat", None, None, max_sequence_length=T5, do_classifier_free_guidance=False)[0]
    assert one.shape[1] == len(table(pipe, "a red ring"))
    changed = (one[0, :CLIP] != two[0, :CLIP]).any(-1).nonzero()[:, 0].tolist()
    first = table(pipe, "a red ring").word_spans("ring")["clip"][0]
    assert min(changed) == first


def test_words_share_indices_between_streams(pipe: Any) -> None:
    found = table(pipe, "a red ring")
    assert found.word_spans("red ring") == {"clip": [2, 3], "t5": [13, 14, 15]}
    assert found.word_spans("RING") == {"clip": [3], "t5": [14, 15]}
    assert found.positions(word=2) == found.positions(word="ring") == [3, 14, 15]


def test_repeated_words_are_told_apart(pipe: Any) -> None:
    found = table(pipe, "cat and cat")
    assert len(found.word_spans("cat")["clip"]) == 2
    first, second = (found.word_spans("cat", occurrence=k)["t5"] for k in (0, 1))
    assert first != second and sorted(first + second) == found.word_spans("cat")["t5"]
    with pytest.raises(UserError, match="occurs 2 times"):
        found.word_spans("cat", occurrence=2)


@pytest.mark.parametrize(
    ("prompt", "word", "clip"),
    [("café", "café", [1, 2, 3, 4]), ("a 12", "12", [2, 3]), ("a, red", "red", [3]), ("a, red", ",", [2])],
)
def test_accents_digits_and_signs(pipe: Any, prompt: str, word: str, clip: list[int]) -> None:
    assert table(pipe, prompt).word_spans(word)["clip"] == clip


def test_a_bare_word_start_belongs_to_the_next_word(pipe: Any) -> None:
    found = table(pipe, "a dog")  # T5: "▁a", "▁", "d", "o", "g"
    assert found.word_spans("dog")["t5"] == [13, 14, 15, 16]


def test_the_empty_prompt_has_no_words(pipe: Any) -> None:
    found = table(pipe, "")
    assert found.kinds[:CLIP] == ["bos", "eos"] + ["pad"] * 10
    assert found.kinds[CLIP:] == ["eos"] + ["pad"] * 9
    assert found.positions(kind="word") == [] and found.truncated == {}


def test_truncated_words_are_named_per_stream(pipe: Any) -> None:
    found = table(pipe, "a red ring and a cat and a red house")
    assert found.truncated["t5"] == ("red", "house")  # "ring" takes two of the nine places
    assert found.truncated["clip"][-1] == "house"
    with pytest.raises(UserError, match="fell off"):
        found.word_spans("house")
    assert "pad" not in found.kinds
    assert found.unread == ["red", "house"] and table(pipe, "a red ring").unread == []


def test_unknown_words_name_the_closest(pipe: Any) -> None:
    with pytest.raises(UserError, match="did you mean 'ring'"):
        table(pipe, "a red ring").word_spans("rings")
    with pytest.raises(UserError, match="span kind"):
        table(pipe, "a red ring").positions(kind="words")


@pytest.mark.parametrize("length", [10, 32])
def test_without_t5_its_slots_are_null(length: int) -> None:
    pipe = tiny.pipeline("no-t5")
    found = token_tables(pipe, FAMILIES["sd3"], ["a red ring"], length)[0]
    embeds = pipe.encode_prompt("a red ring", None, None, max_sequence_length=length)[0]
    assert len(found) == embeds.shape[1] == CLIP + length
    assert found.positions(kind="null") == list(range(CLIP, CLIP + length))
    assert embeds[:, CLIP:].abs().max() == 0


def test_different_prompts_for_the_two_clips_have_no_single_word(pipe: Any) -> None:
    found = token_tables(pipe, FAMILIES["sd3"], [["a red ring", "a blue cat", "a red ring"]], T5)[0]
    clip = found.tokens[:CLIP]
    assert clip[0].kind == "bos" and clip[1].word == "a"
    assert clip[2].kind == "word" and clip[2].word is None
    with pytest.warns(UserWarning, match="tokenizers of 'clip' place 'ring' differently"):
        assert found.word_spans("ring") == {"t5": [14, 15]}


def test_an_unknown_table_says_so() -> None:
    found = unknown_table(4, "text")
    assert found.kinds == ["unknown"] * 4 and found.prompt == "text"


def test_every_stream_is_searched_in_its_own_text(pipe: Any) -> None:
    found = token_tables(pipe, FAMILIES["sd3"], [["a cat", "a cat", "red house on grass"]], T5)[0]
    assert found.texts == {"t5": "red house on grass"} and found.text("clip") == "a cat"
    assert found.word_spans("cat") == {"clip": [2]}
    assert found.word_spans("house") == {"t5": [13]} == found.word_spans("red house on", occurrence=0) | {"t5": [13]}
    assert found.words == ["a", "cat", "red", "house", "on", "grass"]
    assert [token.word for token in found.tokens[CLIP : CLIP + 4]] == ["red", "house", "on", "grass"]
    assert [found.words[token.word_index] for token in found.tokens if token.word] == [
        token.word for token in found.tokens if token.word
    ]
    with pytest.raises(UserError, match="unknown word 'ring'"):
        found.word_spans("ring")


def test_a_word_that_is_missing_can_be_nothing(pipe: Any) -> None:
    found = table(pipe, "a red ring and a cat and a red house")
    assert found.word_spans("dog", missing_ok=True) == {} == found.word_spans("house", missing_ok=True)
    assert found.word_spans("ring", missing_ok=True) == found.word_spans("ring")


def test_characters_have_positions(pipe: Any) -> None:
    found = table(pipe, "a red ring")
    assert found.spans(2, 5) == {"clip": [2], "t5": [13]}
    assert found.spans(8, 10) == {"clip": [3], "t5": [15]}  # T5: "▁ri", "ng"
    assert found.spans(0, 10) == found.word_spans("a red ring")
    assert found.spans(1, 2) == {} == found.spans(2, 5, text="another text")


def test_part_of_a_word_is_taken_and_said(pipe: Any) -> None:
    found = table(pipe, "a red ring")
    with pytest.warns(UserWarning, match="'ng' is no word of 'a red ring'"):
        assert found.word_spans("ng") == {"clip": [3], "t5": [15]}


def of(tokenizer: Any, prompt: str, length: int = 64) -> TokenTable:
    """The table of a family with one stream and no template."""
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=object())
    return token_tables(pipeline, FAMILIES["aura_flow"], [prompt], length)[0]


def spelled(found: TokenTable, phrase: str) -> str:
    """The characters that the tokens of a phrase stand for."""
    (positions,) = found.word_spans(phrase).values()
    covered = {place for p in positions for place in range(found.tokens[p].start, found.tokens[p].stop)}
    return "".join(found.prompt[place] for place in sorted(covered)).strip()


@pytest.mark.parametrize("kind", ["byte-level", "pieces", "pieces without offsets"])
@pytest.mark.parametrize(
    ("prompt", "phrase", "expected"),
    [
        ("一只红色的猫", "猫", "猫"),
        ("一只红色的猫", "红色", "红色"),
        ("a 猫, ring", "猫", "猫"),
        ("a 猫, ring", "ring", "ring"),
        ("รูปแมวแดง", "แมว", "แมว"),
        ("un café noir", "cafe\u0301", "café"),
        ("un cafe\u0301 noir", "café", "cafe\u0301"),
        ("l’eau and l'eau", "eau", None),
        ("हिन्दी में", "हिन्दी", "हिन्दी"),
    ],
)
def test_any_part_of_a_prompt_is_found(
    kind: str, prompt: str, phrase: str, expected: str | None, tmp_path: Path
) -> None:
    makers = {
        "byte-level": llm_tokenizer,
        "pieces": tiny.t5_tokenizer,
        "pieces without offsets": lambda: tiny.sentencepiece_tokenizer(tmp_path),
    }
    tokenizer = makers[kind]()
    found = of(tokenizer, prompt)
    if expected is None:
        with pytest.warns(UserWarning, match="is no word"):
            assert len(found.word_spans(phrase)) == 1
        assert spelled(found, "l'eau").replace(" ", "") == "l’eaul'eau"
    elif kind == "pieces" and tokenizer.unk_token_id in tokenizer(prompt)["input_ids"]:
        assert set(folded(phrase)[0]) <= set(folded(spelled(found, phrase))[0])  # unknown letters are one token
    else:
        # The mark of a decomposed accent may be no character of any token.
        assert expected.startswith(spelled(found, phrase)) and len(expected) - len(spelled(found, phrase)) <= 1


def test_one_token_of_two_words_is_read_for_both() -> None:
    tokens = (Token("llm", "word", "a", 0, 0, 1), Token("llm", "word", ".", 1, 1, 3))
    found = TokenTable('a."', tokens)
    assert found.words == ["a", ".", '"'] and found.unread == []
    assert found.word_spans(".") == found.word_spans('"') == {"llm": [1]}


def test_runs_without_blanks_have_the_tokens_for_words(tmp_path: Path) -> None:
    found = of(llm_tokenizer(), "一只猫 red")
    assert found.words == ["一", "只", "猫", "red"]
    assert [found.words[token.word_index] for token in found.tokens if token.kind == "word"] == [
        *"一一一只只只猫猫猫",
        "red",
    ]
    assert TokenTable("一只猫", ()).words == ["一只猫"]


@pytest.fixture
def shouting() -> Any:
    """SD3's tokenizers, where a run of "!" is one token to the first CLIP and pads to the second."""
    merges = [*tiny.MERGES, ("!", "!</w>")]
    return SimpleNamespace(
        tokenizer=tiny.clip_tokenizer("<|endoftext|>", merges), text_encoder=object(),
        tokenizer_2=tiny.clip_tokenizer("!", merges), text_encoder_2=object(),
        tokenizer_3=tiny.t5_tokenizer(), text_encoder_3=object(),
    )  # fmt: skip


def test_encoders_that_disagree_are_named_and_the_others_read(shouting: Any) -> None:
    found = table(shouting, "a red !! cat")
    assert found.disputed == {"clip": ("!", "!", "cat")} and found.truncated == {} and found.unread == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(found.word_spans("red")) == {"clip", "t5"}
    with pytest.warns(UserWarning, match="tokenizers of 'clip' place 'cat' differently"):
        assert set(found.word_spans("cat")) == {"t5"}
    assert table(shouting, "a red ! cat!").disputed == {}
    shouting.text_encoder_3 = None
    assert table(shouting, "a red !! cat").unread == ["!", "!", "cat"]
    with pytest.raises(UserError, match=r"'clip' place 'cat' differently .* no other text encoder reads it"):
        table(shouting, "a red !! cat").word_spans("cat")


def test_tables_of_fixed_length_are_not_of_a_call_with_more_text() -> None:
    """As HunyuanVideo's image-to-video pipeline has it: the embedded picture stands before the text."""
    table = TokenTable("a", (Token("t5", "word"), Token("t5", "pad"), Token("t5", "pad")))
    assert fitted(FAMILIES["flux"], [table], 4) == [None]
    assert fitted(FAMILIES["flux"], [table], 3) == [table]
    assert [len(one) for one in fitted(FAMILIES["flux"], [table], 2) if one is not None] == [2]
    assert fitted(FAMILIES["flux"], [table], 0) == [None]


def test_a_prompt_beyond_all_encoders_is_refused(pipe: Any) -> None:
    with pytest.raises(UserError, match=r"prompt 'a red .* has 30000 characters; at most 20000 are read"):
        table(pipe, "a red ring" * 3000)
    assert len(table(pipe, "a red ring " * 1800).tokens) == tiny.CLIP_LENGTH + tiny.T5_LENGTH
