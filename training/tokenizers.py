"""Tokenizers of the embedded model, written by hand from the grammar's words.

Trained tokenizers are not reproducible (the trainers of the `tokenizers` library give other ids on each run), so merges
and vocabulary are constructed: every word of the scenes grammar is one token, anything else falls into bytes (CLIP) or
letters (T5).
"""

from __future__ import annotations

import string
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mmdit_probe.scenes.captions import WORDS

TEXT_LENGTH = 24
"""Tokens per text stream: the longest caption of the grammar has 20 words, and two ends."""

MASK = "<mask>"
"""Stands for a hidden word while T5 is trained."""


def ids_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """Ids [B, 24] of texts, padded or cut to `TEXT_LENGTH`."""
    found = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return found.input_ids  # type: ignore[no-any-return]


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level BPE tokenizer as CLIP's; ``pad_token`` is "<|endoftext|>" for CLIP-L and "!" for CLIP-G."""
    alphabet = sorted(bytes_to_unicode().values())
    pieces = [*alphabet, *(a + "</w>" for a in alphabet)]
    merges = _merges(WORDS)
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=TEXT_LENGTH,
        pad_token=pad_token,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that join every word into one piece.

    Each word is split with the merges so far and its pieces are joined from the left by new ones. New merges rank below
    the old, and an earlier word always has an older merge to apply, so it is not disturbed.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply(pieces, merges[-1:])
    return merges


def _apply(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: merges in the order of their rank."""
    ranks = {pair: i for i, pair in enumerate(merges)}
    while True:
        candidates = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not candidates:
            return pieces
        _, i = min(candidates)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer as T5's: pad 0, </s> 1, <unk> 2, one piece per word, letters as a fallback."""
    letters = [*string.ascii_lowercase, *string.digits, *",.;:-'\""]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), (MASK, 0.0)]
    vocab += [("\u2581" + word, -1.0) for word in WORDS]
    vocab += [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)
