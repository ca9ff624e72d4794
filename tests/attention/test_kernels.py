"""The parity check finds nothing on a healthy device, and finds what is wrong with a broken one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_probe.attention import exact, kernels
from mmdit_probe.attention.call import SDPACall
from mmdit_probe.cli.app import main

CASES = {case.name: case for case in kernels.CASES}


@pytest.mark.parametrize("kernel", ["flash", "math", kernels.INDICATOR])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_every_way_of_this_device_passes(kernel: str, dtype: str) -> None:
    for name in ("head 128", "key mask", "grouped heads"):
        row = kernels.check(CASES[name], dtype, "cpu", kernel)
        assert row["status"] == "pass", row
        assert (row["lse"] is None) == (kernel == kernels.INDICATOR)


def test_indicator_values_replace_a_missing_lse_in_every_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device without any log-sum-exp does: the engine takes the other way by itself."""
    monkeypatch.setattr(exact, "attend", lambda call: (call.stock(), None))
    for case in kernels.CASES[:3]:
        row = kernels.check(case, "float32", "cpu", "native")
        assert row["status"] == "pass" and row["lse"] is None


def test_an_lse_that_is_off_fails_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exact.attend

    def off(call: SDPACall) -> tuple[Tensor, Tensor | None]:
        output, lse = right(call)
        return output, None if lse is None else lse + 1e-3

    monkeypatch.setattr(exact, "attend", off)
    row = kernels.check(CASES["head 64"], "bfloat16", "cpu", "flash")
    assert row["status"] == "fail" and "lse" in row["reason"] and "mass" in row["reason"]
    assert "head 64" in kernels.summary([row])[0]["remark"]


def test_an_output_that_is_not_stock_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exact.attend
    monkeypatch.setattr(exact, "attend", lambda call: (right(call)[0] + 1e-6, right(call)[1]))
    assert "stock" in kernels.check(CASES["head 64"], "float32", "cpu", "flash")["reason"]


def test_a_probe_that_breaks_where_the_model_runs_fails_and_is_no_missing_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("wrong stride")

    monkeypatch.setattr(kernels, "CASES", kernels.CASES[:1])
    monkeypatch.setattr(exact, "reduce", broken)
    row = kernels.check(CASES["head 64"], "float32", "cpu", "flash")
    assert row["status"] == "fail" and row["reason"] == "wrong stride"
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--deep", "--device", "cpu"])
    assert stop.value.code == 1 and "wrong stride" in capsys.readouterr().out


def test_a_kernel_that_torch_does_not_run_is_unavailable_with_its_reason() -> None:
    row = kernels.check(CASES["head 64"], "float32", "cpu", "cudnn")
    assert row["status"] == "unavailable" and row["reason"]


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_deep_prints_all_rows_and_fails_if_one_does(
    broken: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "CASES", kernels.CASES[:1])
    monkeypatch.setattr(kernels, "DTYPES", ("float32",))
    if broken:
        monkeypatch.setitem(kernels.LIMITS, "float32", {"lse": 0.0, "mass": 1.0, "map": 1.0})
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--deep", "--device", "cpu", "--json"])
    assert stop.value.code == int(broken)
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["parity"]
    assert [row["kernel"] for row in found] == list(kernels.KERNELS["cpu"])
    assert (found[0]["status"] == "fail") == broken


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_of_the_gpu_passes() -> None:
    assert [row for row in kernels.rows("cuda") if row["status"] == "fail"] == []


def test_the_summary_is_of_what_was_measured() -> None:
    row = {"kernel": "flash", "dtype": "float16", "case": "a", "status": "pass", "reason": "", "mass": 0.1, "map": None}
    found = kernels.summary([row | {"lse": 0.2}, row | {"lse": None}, row | {"lse": 0.3, "status": "fail"}])
    (one,) = found
    assert (one["lse"], one["mass"], one["map"], one["pass"], one["fail"]) == (0.3, 0.1, None, 2, 1)
