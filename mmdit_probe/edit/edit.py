"""What every edit shares: where it acts, and how its result is put into the call.

    class Half(Edit):
        def attend(self, call, place, proceed): return 0.5 * proceed(call)

An edit names a block (query -> key) and, optionally, layers, heads, steps, guidance branches and, among text keys,
encoder streams, span kinds or words. Everything outside that address keeps the stock output bit for bit. Edits of one
layer compose in the order given to `probe(edits=[...])`: the first is the outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from mmdit_probe.attention.call import SDPACall
from mmdit_probe.attention.intercept import ModuleCall, Stage, sole_output
from mmdit_probe.data.words import find
from mmdit_probe.errors import RunError, UserError, brief, check_known
from mmdit_probe.models.layout import Layer, Layout, Places
from mmdit_probe.models.tokens import SPAN_KINDS, TokenTable
from mmdit_probe.observe.backend import refuse_reordered
from mmdit_probe.observe.pipeline_labels import PERTURBED
from mmdit_probe.observe.sample_order import (
    canonical_call,
    canonical_hidden,
    gathered,
    hidden_keys,
    restored,
    scattered,
)
from mmdit_probe.specs import HeadSpec, Spec, heads_at, named_of, number, reread

if TYPE_CHECKING:
    from mmdit_probe.observe.probe import Run

Proceed = Callable[[SDPACall], Tensor]
Modality = Literal["image", "text", "reference"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
BRANCHES = ("cond", "uncond", "perturbed", "unknown")


@dataclass(frozen=True)
class Place:
    """The address of an edit in one attention call.

    Attributes:
        layout: kinds of the N joint tokens.
        rows: [B] boolean, the samples concerned. heads: [H] boolean.
        queries: [N] boolean. keys: [B, K] boolean among the keys of the modality.
        tables: token table per sample.
    """

    layout: Layout
    rows: Tensor
    heads: Tensor
    queries: Tensor
    keys: Tensor
    tables: Sequence[TokenTable]

    @property
    def mask(self) -> Tensor:
        """[B, H, N, 1] boolean: the entries of the output that the edit replaces."""
        return self.rows[:, None, None, None] & self.heads[None, :, None, None] & self.queries[None, None, :, None]


class Addressed:
    """What edits of attention and operations on blocks share; both are frozen dataclasses."""

    steps: Spec
    branches: Sequence[str] | None

    def __post_init__(self) -> None:
        many = {"layers", "steps", "heads", "branches", "streams", "spans", "words"}
        for name in many & {field.name for field in fields(self)}:  # type: ignore[arg-type]
            object.__setattr__(self, name, reread(getattr(self, name)))
        for name in ("branches", "streams", "spans", "words"):
            told = getattr(self, name, None)
            for one in told.values() if isinstance(told, Mapping) else (told,):
                if isinstance(one, str):  # letter by letter, no word would be found
                    raise UserError(f"{name} is {one!r}: expected a list, such as {[one]}")
                if not (one is None or (isinstance(one, Collection) and all(isinstance(text, str) for text in one))):
                    raise UserError(f"{name} is {one!r}: expected a list of texts")
        for branch in self.branches or ():
            check_known("guidance branch", branch, BRANCHES)

    @property
    def neutral(self) -> bool:
        """Whether the setting changes nothing; such an edit leaves the call untouched."""
        return False

    def acts(self, layer: Layer, run: Run) -> bool:
        """Whether it may change anything at the sampling step of the denoising call in progress.

        Raises:
            RunError: there is no such call.
        """
        if self.neutral:
            return False
        if run.current is None:
            raise RunError(f"layer {layer.index} ran outside the transformer's own call: it cannot be edited")
        return run.at(self.steps)

    def rows(self, branches: Sequence[str]) -> Tensor:
        """[B] boolean: the samples concerned, of their guidance branches."""
        return torch.tensor([self.branches is None or branch in self.branches for branch in branches])

    def at(self, **changes: Any) -> Self:
        """The same edit with another address or setting: `blur.at(layers=[3])`."""
        return replace(self, **changes)  # type: ignore[type-var]

    def no_op(self) -> Self:
        """The same edit in a setting that changes nothing."""
        return self.at(branches=())

    def record(self) -> dict[str, Any]:
        """What it is, as JSON values, for a run record."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {name: list(v) if isinstance(v, tuple | list) else v for name, v in values.items()}
        return {"edit": type(self).__name__, **plain}


@dataclass(frozen=True)
class Factored(Addressed):
    """What multiplies something by `factor`; 1 is the no-op."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("factor", self.factor)

    @property
    def neutral(self) -> bool:
        return self.factor == 1.0


@dataclass(frozen=True)
class Edit(Addressed):
    """Base of edits on one block of the joint attention.

    Args:
        query, key: the block, "image", "text" or "reference" each: `("image", "text")` is I2T.
        layers, heads, steps: as in `mmdit_probe.specs`; heads may also be layer -> heads. Calls of `MMDiT.denoise`
            count as every step.
        branches: guidance branches concerned (cond, uncond, perturbed, unknown); None is all of them.
        streams, spans, words: of text keys, only those of these encoder streams, span kinds, words; None is all. Words
            may differ between prompts: prompt -> words; other prompts are left alone.
        references: of reference keys, only those of these pictures by number, from 0; None is all.
        renormalise: divide by the row's new total probability, so that it is 1 again.
    """

    query: Modality = "image"
    key: Modality = "text"
    layers: Spec = "all"
    heads: HeadSpec = "all"
    steps: Spec = "all"
    branches: Sequence[str] | None = None
    streams: Sequence[str] | None = None
    spans: Sequence[str] | None = None
    words: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    references: Sequence[int] | None = None
    renormalise: bool = False

    stage: ClassVar[Stage] = "output"
    by_rows: ClassVar[bool] = False
    """Whether `attend` treats every query by itself, so that it can be asked for the addressed ones alone."""

    def __post_init__(self) -> None:
        for modality in (self.query, self.key):
            check_known("modality", modality, MODALITIES)
        super().__post_init__()
        for span in self.spans or ():
            check_known("span kind", span, SPAN_KINDS)
        if self.key != "text" and (self.streams or self.spans or self.words):
            raise UserError(f"streams, spans and words select text keys; this edit's keys are {self.key} tokens")
        if self.key != "reference" and self.references is not None:
            raise UserError(f"references select reference keys; this edit's keys are {self.key} tokens")

    def attend(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        """The attention output [B, H, N, Dv] under the edit; entries outside `place.mask` are ignored."""
        raise NotImplementedError

    def handler(self, layer: Layer, run: Run) -> Handler:
        """The handler of one layer, for `probe(edits=...)`."""
        return Handler(self, layer, run)


class Handler:
    """An edit at work in one layer of one run."""

    def __init__(self, edit: Edit, layer: Layer, run: Run) -> None:
        self.edit, self.layer, self.run, self.acted = edit, layer, run, False

    @property
    def missed(self) -> str:
        """What no sample of any call had, so that nothing was edited; "" if something was, or was not to be."""
        edit = self.edit
        # No branch, or a forward that a scale of 0 leaves out.
        idle = edit.branches is not None and set(edit.branches) <= {PERTURBED}
        if self.acted or edit.neutral or idle:
            return ""
        narrowed = ("steps", "branches", "streams", "spans", "words", "references")
        told = [f"{name} {getattr(edit, name)}" for name in narrowed if getattr(edit, name) not in (None, "all")]
        return ", ".join(told) or f"{edit.key} tokens"

    def __call__(self, call: SDPACall, module_call: ModuleCall, proceed: Proceed) -> Tensor:
        edit = self.edit
        if not edit.acts(self.layer, self.run):
            return proceed(call)
        layout, places = self.run.arranged(self.layer)
        samples = self._samples(call, module_call)
        hidden = hidden_keys(call)
        if places is None:
            refuse_reordered(self.layer, layout, call, module_call)
            place = self._place(call, layout, samples, hidden)
            if place is None:
                return proceed(call)
            rows = layout.positions(edit.query)
            every = bool(place.rows.all() and place.heads.all()) and edit.by_rows and not call.is_causal
            if every and isinstance(rows, slice) and _separable(call, rows) and sole_output(module_call.module):
                return _spliced(edit, call, place, proceed, rows)
            return self._replaced(call, place, proceed)
        # The edit sees every sample in one order; the kernel, and edits after this one, see the model's own.
        moved = Places(places.keys[samples], places.queries[samples])
        ordered = canonical_call(call, moved)
        refuse_reordered(self.layer, layout, ordered, module_call)
        absent = moved.keys < 0 if hidden is None else canonical_hidden(hidden, moved)
        place = self._place(ordered, layout, samples, absent)
        if place is None:
            return proceed(call)
        found = self._replaced(
            ordered, place, lambda changed: gathered(proceed(restored(changed, call, moved)), moved.queries)
        )
        return scattered(found, proceed(call), moved.queries)

    def _replaced(self, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
        return torch.where(place.mask, edited(self.edit, call, place, proceed), proceed(call))

    def _samples(self, call: SDPACall, module_call: ModuleCall) -> slice:
        """Which samples of the denoising call this attention call holds: all, or one of them."""
        assert self.run.current is not None
        count = len(self.run.current.prompts)
        if len(call.query) == count:
            return slice(None)
        # In a compiled graph the calls of one module are not counted.
        if len(call.query) != 1 or not (module_call.args or module_call.kwargs):
            raise RunError(f"layer {self.layer.index}: it is not known which samples an attention call holds")
        return slice(module_call.calls - 1, module_call.calls)

    def _place(self, call: SDPACall, layout: Layout, samples: slice, hidden: Tensor | None) -> Place | None:
        """Where the edit acts in this call; None if nowhere. `hidden` [B or 1, N]: keys that are not there."""
        edit, current = self.edit, self.run.current
        assert current is not None
        batch, heads, tokens = call.query.shape[:3]
        if not self.layer.attends(heads):
            raise RunError(
                f"layer {self.layer.index} calls attention for {heads} of its heads alone: it cannot be edited"
            )
        if not layout.total == tokens == call.key.shape[-2]:
            raise RunError(
                f"layer {self.layer.index} attends from {tokens} to {call.key.shape[-2]} tokens; expected"
                f" {layout.total} in one softmax: it cannot be edited"
            )
        if layout.queries is not None and not bool(layout.queries[:, layout.positions(edit.query)].any()):
            raise UserError(f"{edit.query} tokens are no queries in the joint attention of {self.run.family.name}")
        if "reference" in (edit.query, edit.key) and not layout.counts["reference"]:
            raise UserError("this call has no reference tokens: give the pipeline a picture to edit")
        tables = current.tokens(layout.counts["text"])[samples]
        if len(layout.references) > 1:
            layout = replace(layout, references=layout.references[samples])
        keys = torch.stack([_keys(edit, table, layout, sample) for sample, table in enumerate(tables)])
        if hidden is not None:  # what the mask hides is not there to be mixed with
            keys &= ~hidden.cpu()[:, layout.positions(edit.key)]
        rows = edit.rows(current.branches[samples]) & keys.any(1)
        if not rows.any():
            return None
        chosen = torch.zeros(heads, dtype=torch.bool)
        chosen[list(heads_at(edit.heads, self.layer.index, heads))] = True
        queries = torch.zeros(tokens, dtype=torch.bool)
        queries[layout.positions(edit.query)] = True
        device = call.query.device
        rows, chosen, queries, keys = (tensor.to(device) for tensor in (rows.expand(batch), chosen, queries, keys))
        self.acted = True
        return Place(layout, rows, chosen, queries, keys, tables)


def _parts(call: SDPACall, rows: slice) -> list[slice]:
    """The queries before, inside and after `rows`, without empty parts."""
    every = (slice(0, rows.start), rows, slice(rows.stop, call.query.shape[-2]))
    return [part for part in every if part.stop > part.start]


def _separable(call: SDPACall, rows: slice) -> bool:
    """Whether a query gets the same bits in its part alone as among all.

    The CPU kernel takes queries in blocks of 32 or a multiple, and a block of one query by the product of a vector,
    which differs in the last bit: no splicing where the whole or a part leaves one.
    """
    lengths = [part.stop - part.start for part in _parts(call, rows)]
    return all(length % 32 != 1 for length in (*lengths, call.query.shape[-2]))


def _spliced(edit: Edit, call: SDPACall, place: Place, proceed: Proceed, rows: slice) -> Tensor:
    """The edit where all samples and heads are concerned: each query is computed once, edited or stock.

    So the cost is that of one attention call. A kernel gives the same bits for a query with fewer others beside it
    (checked on CPU; on a GPU it may choose another split of the keys, and then differs in the last bit).
    """
    parts = []
    for part in _parts(call, rows):
        mask = call.attn_mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = mask[..., part, :]
        of_part = replace(call, query=call.query[:, :, part], attn_mask=mask)
        output = edited(edit, of_part, place, proceed) if part is rows else proceed(of_part)
        parts.append(output.transpose(1, 2))  # as kernels lay it out
    return torch.cat(parts, 1).transpose(1, 2)


def edited(edit: Edit, call: SDPACall, place: Place, proceed: Proceed) -> Tensor:
    """`edit.attend`, renormalised if the edit says so."""
    output, expected = edit.attend(call, place, proceed), (*call.query.shape[:-1], call.value.shape[-1])
    if (shape := getattr(output, "shape", output)) != expected:  # torch would take what fits by broadcasting
        raise UserError(f"{type(edit).__name__}.attend gave {brief(shape)}; expected a tensor of shape {expected}")
    if not edit.renormalise:
        return output
    # The same edit applied to values of one gives each row's new total probability.
    ones = replace(call, value=torch.ones_like(call.value))
    return output / edit.attend(ones, place, proceed)


def _keys(edit: Edit, table: TokenTable, layout: Layout, sample: int) -> Tensor:
    """[K] boolean: the keys concerned among those of the key modality."""
    keys = torch.ones(layout.counts[edit.key], dtype=torch.bool)
    if edit.key == "reference":
        return reference_keys(layout, sample, edit.references)
    if edit.key != "text":
        return keys
    if edit.streams is not None:
        named_of("encoder stream", edit.streams, sorted(set(table.streams)))
        keys &= torch.tensor([stream in edit.streams for stream in table.streams])
    if edit.spans is not None:
        keys &= torch.tensor([kind in edit.spans for kind in table.kinds])
    if edit.words is not None:
        keys &= _words(words_of(edit, table), table)
    return keys


def reference_keys(layout: Layout, sample: int, numbers: Sequence[int] | None = None) -> Tensor:
    """[K] boolean: the tokens of some references (None: all) of a sample among the K reference ones.

    Raises:
        UserError: the sample has no reference of a number.
    """
    counts = [len(positions) for _, positions in layout.references_of(sample)]
    known = range(len(counts))
    for one in numbers or ():
        if one not in known:
            raise UserError(f"no reference {one}: sample {sample} of this call has {len(counts)} (the first is 0)")
    chosen = [number in (known if numbers is None else numbers) for number in known]
    keys = torch.zeros(layout.counts["reference"], dtype=torch.bool)
    keys[: sum(counts)] = torch.tensor(chosen, dtype=torch.bool).repeat_interleave(torch.tensor(counts).long())
    return keys


def words_of(edit: Edit, table: TokenTable) -> Sequence[str]:
    """The words that an edit names in the prompt of one sample."""
    words = edit.words or ()
    return words.get(table.prompt, ()) if isinstance(words, Mapping) else words


def has_words(table: TokenTable, phrase: str) -> bool:
    """Whether a phrase stands in the prompt, or in a text of one stream, as a word or several."""
    return any(find(phrase, text) for text in (table.prompt, *table.texts.values()))


def _words(words: Sequence[str], table: TokenTable) -> Tensor:
    """[T] boolean: the positions of these words; a word that a row's prompt does not have selects nothing there."""
    chosen = torch.zeros(len(table), dtype=torch.bool)
    for word in words:
        if has_words(table, word):
            for positions in table.word_spans(word).values():
                chosen[positions] = True
    return chosen
