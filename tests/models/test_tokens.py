"""Token tables: from the real tokenizer classes, by character offsets."""

from __future__ import annotations

from typing import Any

import pytest

from mmdit_probe.errors import UserError
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.tokens import TokenTable, token_tables, unknown_table
from tests import tiny

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
    assert found.word_spans("ring") == {"t5": [14, 15]}


def test_an_unknown_table_says_so() -> None:
    found = unknown_table(4, "text")
    assert found.kinds == ["unknown"] * 4 and found.prompt == "text"
