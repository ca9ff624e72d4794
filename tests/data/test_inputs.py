"""Hostile and unusual inputs: each is read to the right pixels, labels and names, or refused by its name."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_probe.data import (
    Sample,
    dataset,
    fingerprint,
    open_picture,
    parse_classes,
    picture as opener,
    prompts,
    read_json,
    read_label_map,
    read_lines,
    read_text,
    samples,
    single,
    training_data,
)
from mmdit_probe.data.class_names import read_classes
from mmdit_probe.data.fit import Fit
from mmdit_probe.data.masks import largest
from mmdit_probe.data.picture import picture_size
from mmdit_probe.errors import UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.segment import Reading, discover

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
"""Grey values of a picture of 3 x 4 pixels."""
RGB = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)


def grey(values: Any) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


def turned(path: Path, orientation: int, array: np.ndarray = RGB, **options: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(path, array, exif=exif, **options)


def png(
    path: Path, width: int, height: int, data: bytes = b"", bits: int = 8, colour: int = 2, clear: bytes = b""
) -> Path:  # fmt: skip
    """A PNG of a header and the compressed rows given: of colours, or (`colour` 0) grey, one of them transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    return path


def tiff(path: Path, array: np.ndarray, bits: int, kind: int, width: int = 0, black: int = 1) -> Path:
    """A TIFF of numbers: kind 1 unsigned, 2 signed, 3 float. `width` in pixels where a byte holds several. `black` 0:
    white is zero."""
    height, width = len(array), width or array.shape[1]
    body = array.tobytes()
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, black), (273, 4, 8),
               (277, 3, 1), (278, 4, height), (279, 4, len(body)), (339, 3, kind)]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    for tag, type_, value in entries:
        directory += struct.pack("<HHII", tag, type_, 1, value)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + struct.pack("<I", 0))
    return path


def palette(path: Path, **options: Any) -> Path:
    image = Image.fromarray((np.arange(12).reshape(3, 4) % 3).astype(np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(path, **options)
    return path


def colours(*indices: int) -> np.ndarray:
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    return table[np.arange(12).reshape(3, 4) % 3] if not indices else table[np.array(indices)]


def frames(path: Path, **options: Any) -> Path:
    first, second = Image.fromarray(RGB), Image.new("RGB", (4, 3), "red")
    first.save(path, save_all=True, append_images=[second], **options)
    return path


SIXTEEN = (np.arange(12).reshape(3, 4) * 5000).astype(np.uint16)
ALPHA = np.dstack([RGB, np.tile(np.array([0, 85, 170, 255], np.uint8), (3, 1))])
ON_WHITE = np.rint(255 - (255.0 - RGB) * ALPHA[..., 3:] / 255)

READ: dict[str, tuple[Callable[[Path], Any], np.ndarray, str]] = {
    # name: (how to make it, the right pixels, what the notes say)
    "plain.png": (lambda p: saved(p, RGB), RGB, ""),
    "UPPER.PNG": (lambda p: saved(p, RGB), RGB, ""),
    "plain.webp": (lambda p: saved(p, RGB, lossless=True), RGB, ""),
    "plain.bmp": (lambda p: saved(p, RGB), RGB, ""),
    "plain.tif": (lambda p: saved(p, RGB), RGB, ""),
    "plain.ppm": (lambda p: saved(p, RGB), RGB, ""),
    "grey.png": (lambda p: saved(p, RAMP), grey(RAMP), ""),
    "bits.png": (lambda p: saved(p, RAMP > 100, "1"), grey((RAMP > 100) * 255), ""),
    "palette.png": (palette, colours(), ""),
    "black.png": (lambda p: saved(p, RGB * 0), RGB * 0, ""),
    "one-pixel.png": (lambda p: saved(p, RGB[:1, :1]), RGB[:1, :1], ""),
    "turned-3.png": (lambda p: turned(p, 3), RGB[::-1, ::-1], ""),
    "turned-6.png": (lambda p: turned(p, 6), np.rot90(RGB, -1), ""),
    "turned-8.png": (lambda p: turned(p, 8), np.rot90(RGB, 1), ""),
    "mirrored-2.png": (lambda p: turned(p, 2), RGB[:, ::-1], ""),
    "mirrored-5.webp": (lambda p: turned(p, 5, lossless=True), RGB.transpose(1, 0, 2), ""),
    "turned-6.tif": (lambda p: turned(p, 6), np.rot90(RGB, -1), ""),
    "turned-9-unknown.png": (lambda p: turned(p, 9), RGB, ""),
    "broken-exif.png": (lambda p: saved(p, RGB, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), RGB,
                        "EXIF data cannot be read"),
    "deep.png": (lambda p: saved(p, SIXTEEN), grey(np.rint(SIXTEEN / 257)), ""),
    "deep.tif": (lambda p: saved(p, SIXTEEN), grey(np.rint(SIXTEEN / 257)), ""),
    "deep-clear.png": (lambda p: saved(p, SIXTEEN, transparency=5000),
                       grey(np.where(SIXTEEN == 5000, 255, np.rint(SIXTEEN / 257))), "transparency was laid on white"),
    "deep-turned.tif": (lambda p: tiff(p, SIXTEEN, 16, 1), grey(np.rint(SIXTEEN / 257)), ""),
    "white-is-0.tif": (lambda p: tiff(p, SIXTEEN, 16, 1, black=0), grey(255 - np.rint(SIXTEEN / 257)), ""),
    "white-is-0-float.tif": (lambda p: tiff(p, (RAMP / 255).astype(np.float32), 32, 3, black=0), grey(255 - RAMP), ""),
    "two-bits-clear.png": (lambda p: png(p, 4, 1, b"\0\x1b", 2, 0, b"\0\1"), grey(np.array([[0, 255, 170, 255]])),
                           "transparency was laid on white"),
    "deep-colours-clear.png": (lambda p: png(p, 2, 1, bytes((0, *range(12))), 16, 2, bytes(range(6))),
                               np.array([[[255] * 3, [6, 8, 10]]]), "transparency was laid on white"),
    "deep.pgm": (lambda p: p.write_bytes(b"P5 4 3 65535\n" + SIXTEEN.astype(">u2").tobytes()),
                 grey(np.rint(SIXTEEN / 257)), ""),
    "signed-16.tif": (lambda p: tiff(p, (SIXTEEN // 2).astype(np.int16), 16, 2),
                      grey(np.rint(SIXTEEN // 2 * (255 / 32767))), ""),
    "signed-32.tif": (lambda p: tiff(p, SIXTEEN.astype(np.int32) * 32768, 32, 2),
                      grey(np.rint(SIXTEEN * 32768.0 * (255 / (2**31 - 1)))), ""),
    "unsigned-32.tif": (lambda p: tiff(p, SIXTEEN.astype(np.uint32) * 65536, 32, 1),
                        grey(np.rint(SIXTEEN * 65536.0 * (255 / (2**32 - 1)))), ""),
    "float.tif": (lambda p: saved(p, (RAMP / 255).astype(np.float32)), grey(RAMP), ""),
    "alpha.png": (lambda p: saved(p, ALPHA), ON_WHITE, "transparency was laid on white"),
    "alpha.webp": (lambda p: saved(p, np.dstack([RGB, RAMP * 0 + 255]), lossless=True), RGB, ""),
    "opaque.png": (lambda p: saved(p, np.dstack([RGB, RAMP * 0 + 255])), RGB, ""),
    "grey-alpha.png": (lambda p: saved(p, np.dstack([RAMP, ALPHA[..., 3]]), "LA"),
                       grey(np.rint(255 - (255.0 - RAMP) * ALPHA[..., 3] / 255)), "transparency"),
    "palette-clear.png": (lambda p: palette(p, transparency=1),
                          colours(*(np.arange(12) % 3).tolist()).reshape(3, 4, 3)
                          + np.array([255, 0, 255]) * (np.arange(12).reshape(3, 4, 1) % 3 == 1), "transparency"),
    "rgb-clear.png": (lambda p: saved(p, RGB, transparency=(0, 255, 0)),
                      np.where(np.arange(12).reshape(3, 4, 1) == 0, 255, RGB), "transparency"),
    "moving.gif": (lambda p: frames(p), RGB, "first of 2 frames"),
    "moving.png": (lambda p: frames(p), RGB, "first of 2 frames"),
    "moving.webp": (lambda p: frames(p, lossless=True), RGB, "first of 2 frames"),
    "pages.tif": (lambda p: frames(p), RGB, "first of 2 frames"),
    "name [red]$x$ {}\n.png": (lambda p: saved(p, RGB), RGB, ""),
    "print.tif": (lambda p: saved(p, RGB, "CMYK"), RGB, ""),
    "wrong-suffix.jpg": (lambda p: saved(p, RGB, format="PNG"), RGB, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_pixels_are_right(name: str, tmp_path: Path) -> None:
    make, want, note = READ[name]
    path = tmp_path / name
    make(path)
    found = open_picture(path)
    assert found.image.mode == "RGB"
    assert found.pixels.shape == want.shape
    assert np.abs(found.pixels.astype(int) - want).max() <= (1 if "alpha" in name else 0)
    assert (note in "; ".join(found.notes)) if note else found.notes == ()
    sample = samples(str(path))[0]
    assert np.array_equal(np.asarray(sample.open()), found.pixels) and sample.name == name
    assert tuple(sample.notes) == found.notes


def truncated(path: Path, share: float, **options: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    saved(path, noise, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    # name: (how to make it, what the line says beside the name)
    "missing.png": (lambda p: None, "no picture"),
    "empty.png": (lambda p: p.touch(), "no picture format"),
    "text.png": (lambda p: p.write_text("no picture"), "no picture format"),
    "page.jpg": (lambda p: p.write_text("<!doctype html><html>404</html>"), "no picture format"),
    "vector.svg": (lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "no picture format"),
    "program.png": (lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no picture format"),
    "folder.png": (lambda p: p.mkdir(), "is a folder|no picture in"),
    "pipe.png": (lambda p: os.mkfifo(p), "is a pipe"),
    "socket.png": (bound, "is a socket"),
    "link-to-nothing.png": (lambda p: p.symlink_to("gone"), "no picture"),
    "link-to-itself.png": (lambda p: p.symlink_to(p), "cannot be opened"),
    "link-to-device.png": (lambda p: p.symlink_to("/dev/zero"), "is a device"),
    "cut.png": (lambda p: truncated(p, 0.7), "cannot be read"),
    "cut.jpg": (lambda p: truncated(p, 0.7), "cannot be read"),
    "cut.webp": (lambda p: truncated(p, 0.7, lossless=True), "cannot be read"),
    "cut.bmp": (lambda p: truncated(p, 0.7), "cannot be read"),
    "cut.tif": (lambda p: truncated(p, 0.7), "cannot be read"),
    "cut-header.png": (lambda p: truncated(p, 0.002), "cannot be read"),
    "bomb.png": (lambda p: png(p, 30000, 30000), "too many pixels"),
    "absurd.png": (lambda p: png(p, 2**31 - 1, 2**31 - 1), "cannot be read"),
    "no-rows.png": (lambda p: png(p, 8, 8), "cannot be read"),
    "no-pixels.png": (lambda p: png(p, 0, 8), "cannot be read"),
    "float-255.tif": (lambda p: saved(p, RAMP.astype(np.float32)), "its type has 0..1"),
    "float-nan.tif": (lambda p: saved(p, np.full((3, 4), np.nan, np.float32)), "without NaN"),
    "dark.tif": (lambda p: tiff(p, RAMP.astype(np.int32), 32, 2), "it would be black"),
    "negative.tif": (lambda p: tiff(p, -SIXTEEN.astype(np.int32), 32, 2), "its type has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    path = tmp_path / name
    make(path)
    for read in (open_picture, lambda p: samples(str(p))[0].open((16, 16))):
        with pytest.raises(UserError, match=says) as error:
            read(path)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["a\0b.png", "x" * 300 + ".png", "", "/dev/null", "scenes:val:1.png"])
def test_names_that_no_file_can_have(source: str) -> None:
    with pytest.raises(UserError):
        samples(source)


def test_huge_pictures_are_reduced_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "HUGE", 1000)
    smooth = np.linspace(0, 255, 100)[None].repeat(60, 0)
    rgb = grey(smooth).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.webp"):
        saved(tmp_path / name, rgb)
        found = open_picture(tmp_path / name)
        assert found.image.width * found.image.height <= 1000
        assert found.notes == ("60 x 100 pixels were reduced",)
        assert np.abs(np.asarray(found.image.resize((100, 60))).astype(float) - rgb).max() < 12
        assert open_picture(tmp_path / name, reduce=False).image.size == (100, 60)


def test_pictures_of_other_libraries_of_arrays_are_read_and_what_is_none_is_told() -> None:
    """A tensor, None or a list ended in Python's error about paths."""
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(open_picture(torch.from_numpy(pixels)).pixels, pixels)
    learned = torch.from_numpy(pixels / 255).requires_grad_()
    assert np.array_equal(open_picture(learned).pixels, pixels)
    for other in (None, [pixels, pixels], 3, (3, 4)):
        with pytest.raises(UserError, match=r"expected a file, a PIL image or an array \[height, width, 3\]"):
            open_picture(other)


def test_a_sample_of_an_array_has_a_picture_of_8_bits_and_three_channels() -> None:
    """It gave the array as it was, which references of an editing model and `segment` cannot read."""
    grey = np.array([[0.0, 0.5], [1.0, 0.2]])
    found = Sample("grey", grey).image
    assert found.dtype == np.uint8 and found.tolist() == [[[0] * 3, [128] * 3], [[255] * 3, [51] * 3]]
    covered = np.full((1, 1, 4), [10, 20, 30, 0], np.uint8)
    assert Sample("covered", covered).image.tolist() == [[[255, 255, 255]]]  # laid on white
    plain = np.zeros((2, 2, 3), np.uint8)
    assert Sample("plain", plain).image is plain


def test_masks_of_0_and_1_are_masks() -> None:
    masks = np.array([[[0, 1], [0, 1]], [[1, 0], [0, 0]]], np.uint8)
    assert Sample("a", np.zeros((2, 2, 3), np.uint8), "", masks, ("x", "y")).label().tolist() == [[1, 0], [255, 0]]


def test_arrays_are_pictures_too() -> None:
    assert np.array_equal(open_picture(RGB).pixels, RGB)
    assert np.array_equal(open_picture(RAMP / 255.0).pixels, grey(RAMP))
    assert np.array_equal(open_picture(SIXTEEN).pixels, grey(np.rint(SIXTEEN / 257)))
    assert np.array_equal(open_picture(RAMP > 100).pixels, grey((RAMP > 100) * 255))
    with pytest.raises(UserError, match=r"holds values up to 220 .* it would be black; give it in 8 or 16 bits"):
        open_picture(RAMP.astype(int))
    for bad in (np.zeros((2, 2, 5)), np.zeros(4), np.zeros((0, 3)), np.full((2, 2), 255.0), np.zeros((2, 2), complex)):
        with pytest.raises(UserError):
            open_picture(bad)


LABELS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    # name: (how to make it, the ids, or what the refusal says)
    "grey.png": (lambda p: saved(p, RAMP), RAMP),
    "indexed.png": (palette, np.arange(12).reshape(3, 4) % 3),
    "deep.png": (lambda p: saved(p, SIXTEEN), SIXTEEN),
    "deep.tif": (lambda p: saved(p, SIXTEEN.astype(np.int32) * 9), SIXTEEN.astype(int) * 9),
    "bits.png": (lambda p: saved(p, RAMP > 100, "1"), RAMP > 100),
    "two-bits.png": (lambda p: png(p, 4, 2, b"\0\x1b\0\xe4", 2, 0), [[0, 1, 2, 3], [3, 2, 1, 0]]),
    "four-bits.png": (lambda p: png(p, 4, 1, b"\0\x01\x2f", 4, 0), [[0, 1, 2, 15]]),
    "four-bits.tif": (lambda p: tiff(p, np.array([[0x01, 0x2F]], np.uint8), 4, 1, width=4), [[0, 1, 2, 15]]),
    "white-is-0.tif": (lambda p: tiff(p, RAMP, 8, 1, black=0), RAMP),
    "four-bits-white-is-0.tif": (lambda p: tiff(p, np.array([[0x01, 0x2F]], np.uint8), 4, 1, width=4, black=0),
                                 [[0, 1, 2, 15]]),
    "turned.png": (lambda p: turned(p, 6, array=RAMP), np.rot90(RAMP, -1)),
    "colour.png": (lambda p: saved(p, RGB), "colour picture"),
    "alpha.png": (lambda p: saved(p, np.dstack([RAMP, RAMP]), "LA"), "colour picture"),
    "lossy.jpg": (lambda p: saved(p, RAMP), "JPEG"),
    "lossy.jp2": (lambda p: saved(p, RAMP, irreversible=True), "JPEG"),
    "lossy.tif": (lambda p: saved(p, RAMP, compression="jpeg"), "JPEG"),
    "float.tif": (lambda p: saved(p, RAMP.astype(np.float32)), "float32"),
    "frames.png": (lambda p: frames(p), "several frames"),
    "text.png": (lambda p: p.write_text("0 1 2"), "no picture format"),
    "cut.png": (lambda p: truncated(p, 0.7), "cannot be read"),
    "pipe.png": (lambda p: os.mkfifo(p), "is a pipe"),
    "gone.png": (lambda p: None, "no label map"),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_right_or_refused(name: str, tmp_path: Path) -> None:
    make, want = LABELS[name]
    make(tmp_path / name)
    if isinstance(want, str):
        with pytest.raises(UserError, match=want) as error:
            read_label_map(tmp_path / name)
        assert name in str(error.value)
    else:
        assert np.array_equal(read_label_map(tmp_path / name), np.asarray(want).astype(np.int64))


TEXTS: dict[str, tuple[bytes, Any]] = {
    # name: (bytes, lines or what the refusal says)
    "unix.txt": (b"a\nb\n", ["a", "b"]),
    "dos.txt": (b"a\r\nb\r\n", ["a", "b"]),
    "no-end.txt": (b"a\nb", ["a", "b"]),
    "mark.txt": (b"\xef\xbb\xbfcat\n", ["cat"]),
    "mark-inside.txt": ("a\ufeffb".encode(), ["a\ufeffb"]),
    "vertical.txt": (b"a\x0bb\nc\x0cd\n", ["a\x0bb", "c\x0cd"]),
    "separators.txt": ("a\u2028b\u2029c\x85d\ne".encode(), ["a\u2028b\u2029c\x85d", "e"]),
    "file-separator.txt": (b"a\x1cb\x1dc\x1ed\n", ["a\x1cb\x1dc\x1ed"]),
    "emoji.txt": ("🐈 chat\n".encode(), ["🐈 chat"]),
    "markup.txt": (b"[red]$\\alpha$ <b>{x}%s\n", ["[red]$\\alpha$ <b>{x}%s"]),
    "blank.txt": (b"a\n\nb\n", ["a", "", "b"]),
    "latin.txt": ("café".encode("latin-1"), r"latin.txt' is not UTF-8 text \(byte 3\)"),
    "utf-16.txt": ("cat".encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
    "utf-16-bare.txt": ("cat".encode("utf-16-le"), r"NUL at byte 1"),
    "surrogate.txt": (b"\xed\xa0\x80", "not UTF-8 text"),
    "picture.txt": (b"\x89PNG\r\n", "not UTF-8 text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_lines_are_right_or_the_byte_is_named(name: str, tmp_path: Path) -> None:
    data, want = TEXTS[name]
    path = tmp_path / name
    path.write_bytes(data)
    if isinstance(want, str):
        for read in (read_text, read_lines, lambda p: prompts(str(p)), lambda p: parse_classes(p), read_classes):
            with pytest.raises(UserError, match=want):
                read(path)
    else:
        assert read_lines(path) == want
        assert prompts(str(path)) == [line for line in want if line]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "prompt,seed\n\"a cat, asleep\",1\n"), ("a.TSV", "prompt\tseed\n"), ("a.json", '[\n"a cat"\n]'),
     ("a.jsonl", '{"prompt": "a cat"}\n'), ("a.yaml", "- a cat\n")],
)  # fmt: skip
def test_tables_and_documents_are_no_lines(tmp_path: Path, name: str, text: str) -> None:
    """A header, quotes and brackets stood among the prompts, and the name of the file among the classes."""
    (tmp_path / name).write_text(text)
    for read in (prompts, parse_classes, read_lines):
        with pytest.raises(UserError, match=f"{name}' is no plain text but {name[2:].upper()}; expected"):
            read(str(tmp_path / name))


def test_texts_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for read in (read_text, read_json, lambda p, _: prompts(str(p)), lambda p, _: parse_classes(p)):
        with pytest.raises(UserError, match="is a pipe"):
            read(tmp_path / "pipe.txt", "anything")
    with pytest.raises(UserError, match=r"deep.json' cannot be read as JSON"):
        read_json(tmp_path / "deep.json", "anything")
    with pytest.raises(UserError, match="is a folder"):
        prompts(str(tmp_path))
    assert prompts("a\0b") == ["a\0b"]


def test_a_class_file_takes_commas_and_a_list_of_ids_does_not(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# pets\ncat, dog; hound\nwet grass,\n\n[b]$x$/y\u2028z\n", encoding="utf-8")
    names = [one.synonyms for one in parse_classes(path)]
    assert names == [("cat",), ("dog", "hound"), ("wet grass",), ("[b]$x$/y\u2028z",)]
    assert names == [one.synonyms for one in parse_classes("cat, dog; hound, wet grass, [b]$x$/y\u2028z")]
    for blank in ("", "\n", "\n\n", "\n\n\n"):
        path.write_text(f"traffic light, red\nt-shirt{blank}", encoding="utf-8")
        assert [one.name for one in read_classes(path)] == ["traffic light, red", "t-shirt"]
    for line, why in (("", "line 2 is empty"), ("# pets", "line 2 is a comment")):
        path.write_text(f"cat\n{line}\ndog\n", encoding="utf-8")
        with pytest.raises(UserError, match=why):
            read_classes(path)


def test_a_file_is_one_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--classes coco.names` was one class of that name, and PROMPTS.TXT, misspelt, a prompt."""
    monkeypatch.chdir(tmp_path)
    for name in ("coco.names", "labels"):
        (tmp_path / name).write_text("cat\ndog\n")
        assert [one.name for one in parse_classes(name)] == ["cat", "dog"]
    assert [one.name for one in parse_classes("labels, sky")] == ["labels", "sky"]
    with pytest.raises(UserError, match=r"no prompts file 'PROMPTS\.TXT'"):
        prompts("PROMPTS.TXT")


@pytest.mark.parametrize("second", ["Café", "cafe\u0301"])
def test_a_class_in_another_spelling_is_the_same_class(second: str) -> None:
    with pytest.raises(UserError, match="is given twice"):
        parse_classes(["café", second])
    with pytest.raises(UserError, match="is given twice"):
        parse_classes(["wet grass", "wet\u00a0grass"])


def generic(root: Path, names: list[str], label: str = ".png") -> Path:
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("red, dark\ncat\n")
    for number, name in enumerate(names):
        saved(root / "images" / name, np.full((3, 4, 3), 40 * number, np.uint8))
        saved(root / "labels" / (Path(name).stem + label), np.full((3, 4), number % 2, np.uint8))
    return root


def test_labels_follow_names_whatever_the_suffix(tmp_path: Path) -> None:
    data = dataset(f"folder:{generic(tmp_path / 'a', ['b.PNG', 'a.Png', 'a.b.png'], '.PNG')}")
    assert [one.name for one in data] == ["a.b", "a", "b"]
    assert [int(one.label()[0, 0]) for one in data] == [0, 1, 0]
    assert [int(one.image[0, 0, 0]) for one in data] == [80, 40, 0]
    assert data.classes[0].name == "red, dark" and data[0].names == ("red, dark", "cat")
    assert [one.name for one in dataset(str(tmp_path / "a"))] == [one.name for one in data]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_captions_and_masks_follow_names_however_accents_and_suffixes_are_written(
    tmp_path: Path, forms: tuple[str, str]
) -> None:
    """Some systems' archives hold accents apart from their letters, others the letter with its accent."""
    own, beside = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in forms)
    assert own != beside
    (tmp_path / "masks").mkdir()
    saved(tmp_path / f"{own}.PNG", RGB)
    saved(tmp_path / "masks" / f"{beside}.png", (RAMP > 100).astype(np.uint8))
    (tmp_path / f"{beside}.TXT").write_text("a cat")
    (sample,) = samples(str(tmp_path))
    assert sample.prompt == samples(str(tmp_path / f"{own}.PNG"))[0].prompt == "a cat"
    assert np.array_equal(sample.masks, (RAMP > 100)[None])
    root = generic(tmp_path / "set", [f"{own}.png"])
    (root / "labels" / f"{own}.png").rename(root / "labels" / f"{beside}.png")
    (labelled,) = dataset(str(root))
    assert np.array_equal(labelled.label(), RAMP * 0)


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        saved(tmp_path / name, RGB)
    for read in (lambda s: samples(s), lambda s: training_data(s, size=(16, 16))):
        with pytest.raises(UserError, match=r"'a.jpg' and 'a.png', which share captions"):
            read(str(tmp_path))
    root = generic(tmp_path / "set", ["a.png"])
    saved(root / "images" / "a.jpg", RGB)
    with pytest.raises(UserError, match=r"'a.jpg' and 'a.png'"):
        dataset(f"folder:{root}")
    (root / "images" / "a.jpg").unlink()
    saved(root / "labels" / "a.PNG", RAMP)
    with pytest.raises(UserError, match=r"'a.PNG' and 'a.png'"):
        dataset(f"folder:{root}")


def test_what_stands_beside_pictures_is_no_picture(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", RGB)
    (tmp_path / "b.png").mkdir()
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert [one.name for one in samples(str(tmp_path))] == ["a.png"]
    (tmp_path / "c.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"c.png' cannot be read"):
        samples(str(tmp_path))
    assert samples(str(tmp_path), 1)[0].name == "a.png"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt' is not UTF-8"):
        _ = samples(str(tmp_path), 1)[0].prompt


def coco(root: Path, kind: str, category: dict[str, Any], segmentation: Any, stated: Any, stored: Any) -> Path:
    """One picture of `stored` (height, width), annotated at `stated`."""
    (root / "val2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    saved(root / "val2017" / "1.png", np.zeros((*stored, 3), np.uint8))
    image = {"id": 1, "file_name": "1.png"} | ({"height": stated[0], "width": stated[1]} if stated else {})
    one = {"image_id": 1, "category_id": category["id"], "segmentation": segmentation}
    content = {"images": [image], "categories": [category], "annotations": [one]}
    (root / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(content))
    return root


LEFT = [[0, 0, 10, 0, 10, 20, 0, 20]]
LEFT_RUNS = {"size": [20, 40], "counts": [0, 200, 600]}


@pytest.mark.parametrize("segmentation", [LEFT, LEFT_RUNS])
def test_coco_masks_follow_the_stated_size(tmp_path: Path, segmentation: Any) -> None:
    """The left quarter stays the left quarter of a picture stored at half or double size."""
    cat = {"id": 1, "name": "t-shirt"}
    for place, stored in enumerate([(20, 40), (10, 20), (40, 80)]):
        root = coco(tmp_path / str(place), "instances", cat, segmentation, (20, 40), stored)
        (sample,) = dataset(f"coco-instances:{root}")
        label = sample.label()
        want = np.full(stored, 255)
        want[:, : stored[1] // 4] = 0
        assert np.array_equal(label, want) and sample.names == ("t-shirt",)
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    del content["images"][0]["width"]  # half a size is none: the file's own
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    label = dataset(f"coco-instances:{root}")[0].label
    if isinstance(segmentation, dict):  # which says its own size
        with pytest.raises(UserError, match="it has 20 x 40 pixels, its picture 40 x 80"):
            label()
    else:
        assert (label() == 0).sum() == 20 * 10
    turned_root = coco(tmp_path / "turned", "instances", cat, segmentation, (20, 40), (40, 20))
    with pytest.raises(UserError, match="not of one picture"):
        dataset(f"coco-instances:{turned_root}")[0].label()


@pytest.mark.parametrize(
    ("segmentation", "stated"),
    [(LEFT, (10, 5)), (LEFT, None), (LEFT_RUNS, (10, 20)), ([[0, 0, 1]], (20, 40)), (None, (20, 40)),
     ([["x"]], (20, 40)),
     ({"size": [20, 40], "counts": [801]}, (20, 40)), ({"size": [-1, 4], "counts": []}, (20, 40)),
     ({"size": [10**6, 10**6], "counts": [10**12]}, (20, 40)), ({"size": [20, 40], "counts": [10**30]}, (20, 40)),
     ([[0, 0, 9, float("inf"), 9, 19]], (20, 40)), ({"counts": "b6"}, (20, 40))],
)  # fmt: skip
def test_coco_masks_are_never_cut(tmp_path: Path, segmentation: Any, stated: Any) -> None:
    """A polygon beyond its picture, runs of another size, damaged ones: refused with the picture's name."""
    stored = stated or (5, 5)
    root = coco(tmp_path, "instances", {"id": 1, "name": "cat"}, segmentation, stated, stored)
    with pytest.raises(UserError, match=r"a COCO mask of '1.png' is damaged"):
        dataset(f"coco-instances:{root}")[0].label()


@pytest.mark.parametrize(
    ("part", "change"),
    [(None, {"images": None}), (None, {"images": {"a": 1}}), (None, {"annotations": "abc"}),
     ("images", {"id": float("inf")}), ("images", {"height": float("inf")}), ("images", {"height": "x"}),
     ("annotations", {"image_id": 7}), ("annotations", {"image_id": [1]}), ("categories", {"id": float("inf")}),
     ("categories", {"name": None}), ("categories", {"name": " "}), ("categories", {"name": 5})],
)  # fmt: skip
def test_an_annotation_file_of_another_shape_is_refused(tmp_path: Path, part: str | None, change: Any) -> None:
    root = coco(tmp_path, "instances", {"id": 1, "name": "cat"}, LEFT, (20, 40), (20, 40))
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    (content if part is None else content[part][0]).update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_val2017\.json is no COCO annotation file"):
        dataset(f"coco-instances:{root}")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_whose_name_is_not_utf_8_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"holds 'caf\\udce9.png', a name that is not UTF-8"):
        samples(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "category", "names"),
    [("instances", {"id": 1, "name": "t-shirt"}, ["t-shirt"]),
     ("instances", {"id": 99, "name": "t-shirt"}, ["t-shirt"]),
     ("stuff", {"id": 99, "name": "wall-brick"}, ["wall"]), ("stuff", {"id": 5, "name": "t-shirt"}, ["t-shirt"]),
     ("stuff", {"id": 183, "name": "other"}, []), ("instances", {"id": 3, "name": "other"}, ["other"]),
     ("instances", {"id": 3, "name": "[b]$a_b$; c/d, e\n"}, ["[b]$a_b$; c/d, e\n"])],
)  # fmt: skip
def test_category_names_stay_whole(tmp_path: Path, kind: str, category: dict[str, Any], names: list[str]) -> None:
    root = coco(tmp_path, kind, category, LEFT, (20, 40), (20, 40))
    data = dataset(f"coco-{kind}:{root}")
    assert [one.name for one in data.classes] == names
    assert list(data[0].regions().names) == names


def test_annotations_in_any_order_give_the_same_labels(tmp_path: Path) -> None:
    labels, named = [], []
    for order in (1, -1):
        root = coco(tmp_path / str(order), "instances", {"id": 1, "name": "cat"}, LEFT, (20, 40), (20, 40))
        path = root / "annotations" / "instances_val2017.json"
        content = json.loads(path.read_text())
        content["categories"] += [{"id": 2, "name": "dog"}]
        small = {"image_id": 1, "category_id": 2, "segmentation": [[0, 0, 5, 0, 5, 20, 0, 20]]}
        content["annotations"] = [*content["annotations"], small][::order]
        content["categories"] = content["categories"][::order]
        path.write_text(json.dumps(content))
        (sample,) = dataset(f"coco-instances:{root}")
        labels.append(sample.label())
        named.append(sample.regions().names)
    assert np.array_equal(*labels) and named[0] == named[1] == ("cat", "dog")
    assert labels[0][0].tolist() == [1] * 5 + [0] * 5 + [255] * 30


@pytest.mark.parametrize(
    ("names", "want"),
    [('{"1": "cat", "2": "dog"}', ("cat", "dog")), ('{"2": "cat", "1": "cat"}', ("cat",)),
     ('{"1": "cat"}', r"ids \[2\]"), ("[]", "cannot be read"),
     ('{"1": ["cat"], "2": "x"}', "no text"), ('{"x": "cat"}', "classes.json' cannot be read"),
     ('{"1": "dog", "1": "cat", "2": "x"}', "two keys are called '1'"),
     ('{"1": "dog", "01": "cat", "2": "x"}', "two ids are called 1"),
     ('{"1": " "}', "no text"), ("null", "cannot be read"), ("{", "cannot be read as JSON")],
)  # fmt: skip
def test_names_of_masks(tmp_path: Path, names: str, want: Any) -> None:
    (tmp_path / "masks").mkdir()
    saved(tmp_path / "a.png", RGB)
    saved(tmp_path / "masks" / "a.png", (RAMP // 20 % 3).astype(np.uint8))
    (tmp_path / "masks" / "classes.json").write_text(names)
    if isinstance(want, str):
        with pytest.raises(UserError, match=want):
            _ = training_data(str(tmp_path), size=(3, 4))[0]
    else:
        sample = training_data(str(tmp_path), size=(3, 4))[0]
        assert sample.names == want and sample.masks.sum() == 8 and sample.prompt == " ".join(want)


def test_fingerprints_tell_replaced_inputs(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", RGB)
    first = samples(str(path))[0].fingerprint()
    assert samples(str(path))[0].fingerprint() == first
    (tmp_path / "a.txt").write_text("a cat")
    told = samples(str(path))[0].fingerprint()
    saved(path, RGB[:, ::-1])
    assert len({first, told, samples(str(path))[0].fingerprint()}) == 3
    root = generic(tmp_path / "set", ["a.png", "b.png"])
    whole = dataset(f"folder:{root}").fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", whole)
    assert whole == fingerprint(dataset(f"folder:{root}").samples) != dataset(f"folder:{root}", 1).fingerprint()
    saved(root / "labels" / "b.png", RAMP * 0)
    assert dataset(f"folder:{root}").fingerprint() != whole
    assert fingerprint(samples("scenes:val", 2)) == fingerprint(samples("scenes:val", 2))
    assert fingerprint(samples("scenes:val", 2)) != fingerprint(samples("scenes:test", 2))
    masks = np.ones((1, 3, 4), bool)
    held = Sample("x", RGB, "a", masks).fingerprint()
    assert held == Sample("x", RGB.copy(), "a", masks.copy()).fingerprint()
    assert (
        held != Sample("x", RGB, "a", ~masks).fingerprint() and held != Sample("x", 255 - RGB, "a", masks).fingerprint()
    )


def test_big_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    path = saved(tmp_path / "a.png", rng.integers(0, 255, (400, 400, 3), dtype=np.uint8))
    before = samples(str(path))[0].fingerprint()
    saved(path, rng.integers(0, 255, (400, 400, 3), dtype=np.uint8))
    assert path.stat().st_size > 2**18 and samples(str(path))[0].fingerprint() != before
    plain = np.zeros((400, 400, 3), np.uint8)
    marks = []
    for row in range(0, 400, 8):  # a few pixels of a picture that is not compressed, anywhere
        plain[row, :4] = 255
        marks.append(samples(str(saved(tmp_path / "a.bmp", plain)))[0].fingerprint())
        plain[row, :4] = 0
    assert len({*marks}) == len(marks)


@pytest.mark.parametrize(
    ("source", "says"),
    [("scenes:vall", "did you mean '(scenes:)?val'"), ("scenes:vall:0", "did you mean 'val'"),
     ("vocc20:x", "did you mean 'voc20'"),
     ("voc20:", "needs its folder"), ("voc20:nowhere", "no folder"), ("sa1b:nowhere", "no folder"),
     ("nowhere", "no folder 'nowhere'"), ("folder:/dev/null", "no folder")],
)  # fmt: skip
def test_sources_that_are_not_there(source: str, says: str) -> None:
    for read in (samples, lambda s: training_data(s, size=(16, 16)) if s != "nowhere" else samples(s)):
        with pytest.raises(UserError, match=says):
            read(source) if read is samples else read(source)[0]
    for limit in (0, -1):
        with pytest.raises(UserError, match="leaves nothing to do"):
            samples("scenes:val", limit)


def test_one_table_of_sources(tmp_path: Path) -> None:
    """Commands, evaluation and training see the same pictures and labels."""
    root = generic(tmp_path, ["a.png", "b.png"])
    for source in (f"folder:{root}", str(root)):
        found, trained = samples(source), training_data(source, size=(3, 4), prompt="list")
        assert [one.name for one in found] == [one.name for one in dataset(source)] == ["a", "b"]
        assert np.array_equal(trained[1].image, found[1].image) and trained[1].names == ("cat",)
        assert np.array_equal(trained[1].masks[0], found[1].label() == 1)
    one = single("scenes:val:3")
    assert one.name == "scenes:val:3" and np.array_equal(one.image, samples("scenes:val", 4)[3].image)
    assert np.array_equal(one.label(), dataset("scenes:val", 4)[3].label()) and one.prompt
    with pytest.raises(UserError, match="no single picture"):
        single("scenes:val")


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_a_plain_picture_is_one_segment(colour: int, tiny_model: MMDiT) -> None:
    found = discover(tiny_model, np.full((20, 30, 3), colour, np.uint8), Reading(layers=[1]))
    assert found.names == ["segment 1"] and (found.labels == 0).all() and found.labels.shape == (20, 30)


@pytest.mark.parametrize("orientation", [None, 1, 2, 6, 8, 9])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_the_header_tells_the_size_of_the_upright_picture(tmp_path: Path, orientation: Any, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    _ = saved(path, RGB) if orientation is None else turned(path, orientation)
    assert picture_size(path) == open_picture(path).pixels.shape[:2]


def test_notes_reach_the_training_sample(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", ALPHA)
    sample = training_data(str(tmp_path), size=(16, 16))[0]
    assert sample.notes == ["transparency was laid on white"]


def test_letterbox_fills_up_with_the_mean_on_both_sides() -> None:
    wide = np.zeros((2, 4, 3), np.uint8)
    wide[0] = (200, 100, 0)
    for picture, rows in ((wide, slice(1, 3)), (wide.transpose(1, 0, 2), slice(0, 4))):
        found = np.asarray(Fit.of(picture.shape[:2], (4, 4), 1, "letterbox").apply(picture)).astype(int)
        columns = slice(0, 4) if rows == slice(1, 3) else slice(1, 3)
        assert found.shape == (4, 4, 3) and (found[rows, columns] == picture).all()
        border = np.ones((4, 4), bool)
        border[rows, columns] = False
        assert border.sum() == 8 and (found[border] == (100, 50, 0)).all()


def test_aspect_keeps_the_area_in_whole_tokens() -> None:
    assert Fit.of((200, 100), (64, 64), 16, "aspect").size == (96, 48)  # 64 * 2**.5 and 64 / 2**.5, in sixteens
    assert Fit.of((100, 200), (32, 128), 16, "aspect").size == (48, 96)


def test_masks_of_just_the_least_area_are_kept() -> None:
    half, less = np.array([[True, False]]), np.array([[False, False]])
    assert largest([less, half], min_area=0.5).tolist() == [[[True, False]]]
    assert len(largest([half], min_area=0.51)) == 0
