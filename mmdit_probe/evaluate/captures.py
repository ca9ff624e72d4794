"""Captured forwards that several methods share, and that may be kept on disk so that methods re-run without the model.

    captures = Captures(lambda: load("scenes-sd3"), name="scenes-sd3", cache=Path("captures"))
    [record] = captures.get([("scenes:val:0", Request(image, classes, Reading(layers=(2, 3)), keep=("i2t",)))])

A cache folder holds one safetensors file per capture and index.json: the model it was made with and what each file
answers to. It is asked first; the model is loaded when something is missing. A cache made with other weights is refused
once the model is loaded, and a cache of another model name at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit_probe.data.class_names import SegClass
from mmdit_probe.data.fit import Fit
from mmdit_probe.data.text import read_json
from mmdit_probe.errors import RunError, UserError
from mmdit_probe.models.mmdit import MMDiT
from mmdit_probe.models.names import other_parts
from mmdit_probe.models.tokens import Token, TokenTable
from mmdit_probe.results.atomic import make_folder, write_bytes, write_json
from mmdit_probe.segment.capture import PictureReader, Request, most_tokens
from mmdit_probe.segment.record import Capture, JointRecord, Pass
from mmdit_probe.segment.vocabulary import Prompt, Query

INDEX = "index.json"
VERSION = 2
"""Of the files in a cache; 1 knew no model family and held float32."""
UNREAD = 8
"""Pictures at once as long as all were in the cache, and the model was not loaded."""


class Captures:
    """Where captures come from.

    Args:
        open_model: loads the model; called at most once, when it is needed.
        name: of the model, as asked for. cache: folder of kept captures; None keeps nothing.
        text: how the model encodes text, where not in its own way (T5 left out, another length): with the same weights
            and prompts, captures differ.
        rows: of one forward at most; None takes what is fastest.
        memory: what a record says of where the model's weights wait and how they are stored.
        dtype: that the model was asked for in; "auto" takes that of the cache.

    Raises:
        UserError: the cache belongs to another model, or was made in another dtype.
    """

    def __init__(
        self, open_model: Callable[[], MMDiT], name: str, cache: Path | None = None,
        text: Mapping[str, Any] | None = None, rows: int | None = None, memory: Mapping[str, Any] | None = None,
        dtype: str = "auto",
    ) -> None:  # fmt: skip
        self.memory = dict(memory or {})
        self._open, self.name, self.cache, self.text = open_model, name, cache, dict(text or {})
        self._model: MMDiT | None = None
        self._rows = rows
        self._reader: PictureReader | None = None
        self._facts: dict[str, Any] | None = None
        if cache is not None and (cache / INDEX).is_file():
            self._facts = _read_index(cache)
            made, made_in = self._facts["id"], self._facts["dtype"]
            if made != name:
                raise UserError(f"cache {str(cache)!r} was made with {made}, not {name}; choose another folder")
            if dtype not in ("auto", made_in):
                raise UserError(f"cache {str(cache)!r} was made in {made_in}, not {dtype}; choose another")

    @property
    def model(self) -> MMDiT:
        """The model, loaded now if it was not."""
        if self._model is None:
            self._model = self._open()
            facts = _facts(self.name, self._model)
            made = self._facts or {}
            others = [name for name in facts if name != "parts" and made.get(name, facts[name]) != facts[name]]
            told = ["other weights" if name == "weight_hash" else f"another {name}" for name in others]
            if found := next(iter(told), other_parts(made, facts)):
                what = f"{found} of {self.name}"
                raise UserError(f"cache {str(self.cache)!r} was made with {what}; choose another folder")
            self._facts = facts
            if self.cache is not None and not (self.cache / INDEX).is_file():
                make_folder(self.cache)
                write_json(self.cache / INDEX, {"version": VERSION, "model": facts})
        return self._model

    @property
    def facts(self) -> dict[str, Any]:
        """id, weight_hash, parts, dtype, number of layers and heads, from the cache or the model."""
        if self._facts is None:
            _ = self.model
        assert self._facts is not None
        return self._facts

    @property
    def pictures(self) -> int:
        """How many pictures to ask for at once, so that forwards are full."""
        if self._reader is None:
            return self._rows or UNREAD
        return self._reader.limit.pictures

    @property
    def workers(self) -> int:
        """Threads that may work beside the forwards: none where those take the processors."""
        return 0 if self._model is None or self._model.device.type == "cpu" else 2

    def get(self, asked: Sequence[tuple[str, Request]]) -> list[Capture]:
        """The captures of requests, each with the name of its picture: from the cache, or from the model."""
        paths = [self._path(name, request) for name, request in asked]
        missing = [place for place, path in enumerate(paths) if path is None or not path.is_file()]
        if missing and self._reader is None:
            self._reader = PictureReader(self.model, self._rows)
        fresh = self._reader([asked[place][1] for place in missing]) if self._reader is not None else []
        made, found = dict(zip(missing, fresh, strict=True)), []
        for place, (path, (_, request)) in enumerate(zip(paths, asked, strict=True)):
            if path is not None and place in made:
                save_capture(made[place], path)
            found.append(made[place] if path is None else load_capture(path, request.image))
        return found

    def _path(self, name: str, request: Request) -> Path | None:
        """Where the capture of a request is kept."""
        if self.cache is None:
            return None
        how = {
            "keep": request.keep, "together": request.together, "heads_apart": request.heads_apart,
            "text_kinds": request.text_kinds,
        }  # fmt: skip
        key = _key(name, request.image, request.classes, asdict(request.reading) | how | self.text)
        return self.cache / f"{key}.safetensors"


def save_capture(found: Capture, path: Path) -> None:
    """Write a capture: tensors as float16 safetensors, the rest in the file's metadata. The picture is not stored.

    Probabilities from 6e-5 are kept to a relative error of 5e-4, smaller ones to 3e-8 absolute; so are features and
    logits up to 65504, beyond which the write is refused.

    Raises:
        RunError: a value is too large for float16.
    """
    from safetensors.torch import save

    tensors = {
        f"{number}.{layer}.{part}": _half(getattr(record, part), f"{part} of layer {layer}")
        for number, one in enumerate(found.passes)
        for layer, record in one.records.items()
        for part in JointRecord.PARTS
        if getattr(record, part) is not None
    }
    about = {
        "fit": [found.fit.picture, found.fit.size, found.fit.source, found.fit.target, found.fit.how],
        "grid": found.grid,
        "classes": [one.synonyms for one in found.classes],
        "sigmas": found.sigmas,
        "seeds": found.seeds,
        "layers": found.layers,
        "family": found.family,
        "prompts": [
            {
                "text": one.prompt.text,
                "tokens": [[t.stream, t.kind, t.word, t.word_index, t.start, t.stop] for t in one.prompt.table.tokens],
                "queries": [[q.text, q.of_class, q.spans] for q in one.prompt.queries],
            }
            for one in found.passes
        ],
    }
    write_bytes(path, save(tensors, {"about": json.dumps(about)}))


def _half(part: torch.Tensor, what: str) -> torch.Tensor:
    found = part.half().contiguous()
    if not found.isfinite().all():
        raise RunError(f"{what} holds {float(part.abs().max()):g}, too large for the cache's float16; go without one")
    return found


def load_capture(path: Path, image: NDArray[np.uint8]) -> Capture:
    """Read a capture that `save_capture` wrote.

    Raises:
        UserError: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{str(path)!r} is no kept capture; remove it") from error
    passes = []
    for number, one in enumerate(about["prompts"]):
        table = TokenTable(one["text"], tuple(Token(*token) for token in one["tokens"]))
        queries = tuple(Query(text, of_class, spans) for text, of_class, spans in one["queries"])
        records = {
            layer: JointRecord(
                layer,
                **{p: tensors[key] for p in JointRecord.PARTS if (key := f"{number}.{layer}.{p}") in tensors},
            )
            for layer in about["layers"]
        }
        passes.append(Pass(Prompt(one["text"], table, queries), records))
    picture, size, source, target, how = about["fit"]
    fit = Fit(tuple(picture), tuple(size), tuple(source), tuple(target), how)
    classes = [SegClass(tuple(names)) for names in about["classes"]]
    return Capture(
        image, fit, tuple(about["grid"]), classes, passes, tuple(about["sigmas"]), tuple(about["seeds"]),
        tuple(about["layers"]), family=about["family"],
    )  # fmt: skip


def _read_index(cache: Path) -> dict[str, Any]:
    """The model that a cache was made with.

    Raises:
        UserError: the index is damaged, or of another version.
    """
    index = read_json(cache / INDEX, "the index of a cache")
    if isinstance(index, dict) and index.get("version", 1) != VERSION:
        raise UserError(f"cache {str(cache)!r} was written by another version of this package; remove it")
    facts = index.get("model") if isinstance(index, dict) else None
    if not isinstance(facts, dict) or not {"id", "dtype"} <= facts.keys():
        raise UserError(f"{str(cache / INDEX)!r} is no index of a cache; choose another folder")
    return facts


def _facts(name: str, model: MMDiT) -> dict[str, Any]:
    return {
        "id": name,
        "weight_hash": model.weight_hash,
        "parts": model.parts,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(model.layers),
        "heads": model.heads,
        "size": list(model.default_size),
        "multiple": model.size_multiple,
        "most": most_tokens(model),
    }


def _key(name: str, image: NDArray[np.uint8], classes: Sequence[SegClass], how: dict[str, Any]) -> str:
    about = json.dumps([name, image.shape, [one.synonyms for one in classes], how], sort_keys=True, default=list)
    return hashlib.sha256(about.encode() + image.tobytes()).hexdigest()[:24]
