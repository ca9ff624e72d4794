"""The hand-written tokenizers: every word of the grammar is one token, everything else survives."""

import pytest

from mmdit_probe.scenes import captions
from mmdit_probe.scenes.captions import WORDS
from training.tokenizers import TEXT_LENGTH, clip_tokenizer, t5_tokenizer

ALL = {"clip": clip_tokenizer(), "clip-g": clip_tokenizer("!"), "t5": t5_tokenizer()}


@pytest.mark.parametrize("name", ALL)
def test_every_word_is_one_token(name):
    assert [word for word in WORDS if len(ALL[name].tokenize(word)) != 1] == []


@pytest.mark.parametrize("name", ALL)
def test_captions_fit_and_come_back(name):
    tokens = ALL[name]
    for text in captions("val", 60):
        ids = tokens(text).input_ids
        assert len(ids) <= TEXT_LENGTH
        assert tokens.decode(ids, skip_special_tokens=True).strip() == text


def test_unknown_words_fall_into_bytes_not_into_end_of_text():
    tokens = ALL["clip"]
    ids = tokens("a café Zebra!").input_ids
    assert ids.count(tokens.eos_token_id) == 1
    assert tokens.decode(ids, skip_special_tokens=True).split()[:3] == ["a", "café", "zebra"]


def test_special_tokens_are_as_in_sd3():
    assert ALL["clip"].pad_token == "<|endoftext|>" and ALL["clip-g"].pad_token == "!"
    assert ALL["clip"].model_max_length == ALL["clip-g"].model_max_length == ALL["t5"].model_max_length == TEXT_LENGTH
    assert (ALL["t5"].pad_token_id, ALL["t5"].eos_token_id, ALL["t5"].unk_token_id) == (0, 1, 2)
    assert ALL["clip"].get_vocab() == clip_tokenizer().get_vocab()


def test_saved_tokenizers_load_unchanged(tmp_path):
    for name, tokens in ALL.items():
        tokens.save_pretrained(tmp_path / name)
        again = type(tokens).from_pretrained(tmp_path / name)
        text = "two yellow stars left of a house"
        assert again(text).input_ids == tokens(text).input_ids
        assert len(again) == len(tokens) and again.model_max_length == TEXT_LENGTH
