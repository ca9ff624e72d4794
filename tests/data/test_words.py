"""Words and phrases by characters, in scripts with and without blanks."""

from __future__ import annotations

import itertools
import re
import time
import unicodedata

import pytest
from hypothesis import given, strategies as st

from mmdit_probe.data.words import find, folded, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red-hot ring, isn't it?", ["a", "red-hot", "ring", ",", "isn't", "it", "?"]),
        ("t‑shirt", ["t‑shirt"]),
        ("wet_grass", ["wet", "_", "grass"]),
        ("l’eau l'eau", ["l’eau", "l'eau"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("हिन्दी में बिल्ली", ["हिन्दी", "में", "बिल्ली"]),  # vowel signs and viramas are no letters to `str.isalnum`
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("3只T恤", ["3", "只", "T", "恤"]),
        ("一只猫。แมวแดง", ["一只猫", "。", "แมวแดง"]),
        ("❤\ufe0f ok", ["❤\ufe0f", "ok"]),
        ("👨\u200d👩\u200d👧 👍🏽, 🏳\ufe0f\u200d🌈👩", ["👨\u200d👩\u200d👧", "👍🏽", ",", "🏳\ufe0f\u200d🌈", "👩"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert [text[start:stop] for start, stop in words(text)] == expected


def test_runs_without_blanks_are_divided_where_they_may_be() -> None:
    text = "红猫 and cats"
    assert [text[a:b] for a, b in words(text, edges=range(len(text)))] == ["红", "猫", "and", "cats"]


@pytest.mark.parametrize(
    ("phrase", "text", "expected"),
    [
        ("RING", "a ring", ["ring"]),
        ("red  ring", "a red\nring", ["red\nring"]),
        ("café", "cafe\u0301 café CAFÉ", ["cafe\u0301", "café", "CAFÉ"]),
        ("cafe\u0301", "un café", ["café"]),
        ("q\u0323\u0307", "a q\u0307\u0323", ["q\u0307\u0323"]),  # two marks, in either order
        ("cafe", "cafe\u0301 café", []),
        ("l'eau", "l’eau", ["l’eau"]),
        ("l‘eau", "l'eau", ["l'eau"]),
        ('"red cat"', "a “red cat”", ["“red cat”"]),
        ("t-shirt", "a t‑shirt, t‐shirt", ["t‑shirt", "t‐shirt"]),  # hyphens of which the first does not break
        ("STRASSE", "die Straße", ["Straße"]),
        ("猫", "一只猫和熊猫", ["猫", "猫"]),
        ("红色的猫", "一只红色的猫", ["红色的猫"]),
        ("แมว", "รูปแมวแดง", ["แมว"]),
        ("แม", "แม่", []),  # a tone mark belongs to its letter
        ("cat", "concatenate", []),
        ("👩", "👨\u200d👩\u200d👧 👩", ["👩"]),
        ("क", "की", []),
        ("", "a", []),
        ("  ", "a b", []),
    ],
)
def test_phrases_are_found(phrase: str, text: str, expected: list[str]) -> None:
    assert [text[start:stop] for start, stop in find(phrase, text)] == expected


def test_parts_of_words_are_found_if_asked_for() -> None:
    assert find("cat", "concatenate", whole=False) == [(3, 6)]
    assert find("क", "की", whole=False) == [] and find("s", "Straße", whole=False) == [(0, 1)]


@given(st.text(alphabet="aé\u0301ß猫ก 'x’-", max_size=12), st.integers(0, 12), st.integers(1, 6))
def test_what_is_cut_out_between_letters_is_found_in_any_form(text: str, start: int, length: int) -> None:
    phrase = text[start : start + length]
    places = {place for found in find(phrase, text, whole=False) for place in range(*found)}
    edges = [unicodedata.category(text[at])[0] == "M" for at in (start, start + length) if at < len(text)]
    alike = re.findall(f"(?={re.escape(folded(phrase)[0])})", folded(text)[0])
    if phrase.strip() and phrase.strip() == phrase and not any(edges) and len(alike) == 1:
        assert set(range(start, start + len(phrase))) == places
    composed = unicodedata.normalize("NFC", phrase)
    assert len(find(composed, unicodedata.normalize("NFD", text), whole=False)) == len(find(phrase, text, whole=False))


@given(st.text(max_size=20))
def test_every_character_of_a_folded_text_has_its_place(text: str) -> None:
    letters, places = folded(text)
    assert len(letters) == len(places) and set(places) <= set(range(len(text)))
    assert folded(unicodedata.normalize("NFD", text))[0] == letters


def test_every_word_of_a_long_text_is_found_in_little_time() -> None:
    """3000 different words took minutes: the text was read anew for each."""
    long = [a + b + c for a, b, c in itertools.product("abcdefghijklmno", repeat=3)][:3000]
    text = " ".join(long)
    start = time.process_time()
    assert [find(word, text) for word in long] == [[(at, at + 3)] for at in range(0, 4 * len(long), 4)]
    assert time.process_time() - start < 5
