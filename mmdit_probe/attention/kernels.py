"""Does each attention kernel of this device give what the probe needs? Log-sum-exp, masses and maps against float64.

    for row in rows("cuda"):
        print(row["kernel"], row["dtype"], row["case"], row["status"])

Every kernel that torch can be told to use is tried with every precision on small calls that differ in what has gone
wrong before. Behind `mmdit-probe doctor --deep`; not a benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit_probe.attention import exact, reference
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.errors import first_line

DTYPES = ("float32", "bfloat16", "float16")
INDICATOR = "indicator"
"""The way without any log-sum-exp, as on MPS: tried on every device."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
KERNELS = {"cuda": (*BACKENDS, INDICATOR), "cpu": ("flash", "math", INDICATOR)}
"""Kernels to try, by device; elsewhere torch's own choice and the indicator values."""

LIMITS = {
    "float32": {"lse": 1e-5, "mass": 1e-6, "map": 5e-6},
    "bfloat16": {"lse": 5e-4, "mass": 2e-5, "map": 2e-4},
    "float16": {"lse": 5e-4, "mass": 2e-5, "map": 2e-4},
}
"""Largest errors allowed: of a row's log-sum-exp, of a mean mass, of a single probability."""


@dataclass(frozen=True)
class Case:
    """One small joint attention: image tokens first, then text."""

    name: str
    image: int = 96
    text: int = 37
    width: int = 64
    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    mask: str = ""


CASES = (
    Case("head 64"),
    Case("head 128", width=128),
    Case("even tiles", image=96, text=32),
    Case("long", image=1000, text=77, batch=1, heads=2, key_heads=2),
    Case("key mask", mask="keys"),
    Case("float mask", mask="float"),
    Case("grouped heads", key_heads=2),
)


def make(case: Case, dtype: str, device: str) -> SDPACall:
    """The call of a case: logits of standard deviation about 3, views as diffusers hands them over."""
    generator = torch.Generator().manual_seed(0)
    kind, tokens = getattr(torch, dtype), case.image + case.text

    def draw(heads: int) -> Tensor:
        values = 3**0.5 * torch.randn(case.batch, tokens, heads, case.width, generator=generator)
        return values.to(kind).to(device).transpose(1, 2)

    query, key, value = draw(case.heads), draw(case.key_heads), draw(case.key_heads)
    mask = None
    if case.mask == "keys":
        hidden = torch.tensor([[0], [5]])[: case.batch]
        mask = (torch.arange(tokens)[None] < tokens - hidden)[:, None, None].to(device)
    elif case.mask == "float":
        mask = torch.randn(case.batch, 1, tokens, tokens, generator=generator).to(kind).to(device)
    return SDPACall(query, key, value, mask, enable_gqa=case.key_heads != case.heads)


def check(case: Case, dtype: str, device: str, kernel: str) -> dict[str, Any]:
    """One row: kernel, dtype, case, status (pass, fail, unavailable), lse, mass and map error, reason.

    `unavailable` is a kernel that torch does not run for this call; the probe then meets another one.
    """
    row: dict[str, Any] = {"kernel": kernel, "dtype": dtype, "case": case.name, "status": "unavailable"}
    row |= {"lse": None, "mass": None, "map": None, "reason": ""}
    try:
        call = make(case, dtype, device)
        with _chosen(kernel):
            if kernel in BACKENDS and exact.kernel(call) != kernel:
                return row | {"reason": "torch does not take it for this call"}
            stock = call.stock()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return row | {"reason": first_line(error)}
    # The model would run; if the probe does not, that is no missing kernel.
    try:
        with _chosen(kernel):
            output, lse = exact.attend(call)
            same = torch.equal(output, stock)
            lse = None if kernel == INDICATOR else lse
            text = slice(case.image, None)
            maps, masses = _maps(call, lse, text, case), _masses(call, lse, case)
    except Exception as error:
        return row | {"status": "fail", "reason": first_line(error)}
    host = [None if t is None else t.cpu() for t in (call.query, call.key, call.attn_mask)]
    dense, true_lse = reference.probabilities(*host), reference.logsumexp(*host)  # type: ignore[arg-type]
    errors = {
        "lse": None if lse is None else _largest(lse, true_lse),
        "mass": _largest(masses, dense[..., text].sum(-1)[:, :, : case.image].mean(-1)),
        "map": _largest(maps, dense[:, :, : case.image, text]),
    }
    over = [
        f"{name} {error:.1e}"
        for name, error in errors.items()
        if error is not None and not error <= LIMITS[dtype][name]
    ]
    over += [] if same else ["output is not the stock output"]
    return row | errors | {"status": "fail" if over else "pass", "reason": ", ".join(over)}


def _chosen(kernel: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else nullcontext()


def rows(device: str) -> Iterator[dict[str, Any]]:
    """All rows of a device: every kernel, precision and case."""
    for kernel in KERNELS.get(torch.device(device).type, ("native", INDICATOR)):
        for dtype in DTYPES:
            for case in CASES:
                yield check(case, dtype, device, kernel)


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kernel and precision: largest errors, cases by status, and what failed."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    result = []
    for (kernel, dtype), group in groups.items():
        largest = {
            name: max((row[name] for row in group if row[name] is not None), default=None)
            for name in ("lse", "mass", "map")
        }
        counts = {status: sum(row["status"] == status for row in group) for status in ("pass", "fail", "unavailable")}
        failed = "; ".join(f"{row['case']}: {row['reason']}" for row in group if row["status"] == "fail")
        missing = next((row["reason"] for row in group if row["status"] == "unavailable"), "")
        result.append({"kernel": kernel, "dtype": dtype, **largest, **counts, "remark": failed or missing})
    return result


def _maps(call: SDPACall, lse: Tensor | None, text: slice, case: Case) -> Tensor:
    """I2T maps [B, H, I, T]."""
    if lse is not None:
        return exact.reduce(call, lse, text, slice(0, case.image))
    groups = torch.zeros(case.image + case.text, dtype=torch.long)
    groups[text] = 1 + torch.arange(case.text)
    return exact.group_masses(call, None, groups, case.text + 1)[:, :, : case.image, 1:]


def _masses(call: SDPACall, lse: Tensor | None, case: Case) -> Tensor:
    """Mean mass of image queries on text keys, [B, H]."""
    weights = torch.zeros(1, 1, case.image + case.text, device=call.query.device)
    weights[..., : case.image] = 1 / case.image
    if lse is not None:
        return exact.reduce(call, lse, slice(case.image, None), query_weights=weights).sum(-1)[..., 0]
    groups = (torch.arange(case.image + case.text) >= case.image).long()
    return exact.group_masses(call, None, groups, 2)[:, :, : case.image, 1].mean(-1)


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).abs().max())
