"""`mmdit-probe doctor`: versions, device, the attention kernel that runs, and whether it gives its log-sum-exp.

mmdit-probe doctor --deep --device cuda      # every kernel of the device against float64; exit code 1 if one is off
"""

from __future__ import annotations

import platform
from typing import Annotated, Any

import typer

from mmdit_probe import assets
from mmdit_probe.cli.options import Debug, Device, Json, Quiet
from mmdit_probe.cli.output import Output
from mmdit_probe.errors import counted
from mmdit_probe.experiments.text import TextTable
from mmdit_probe.models.names import check_device
from mmdit_probe.options import METHOD
from mmdit_probe.results import environment

EXAMPLES = ("doctor", "doctor --deep --device cuda")

Deep = Annotated[
    bool,
    typer.Option(
        "--deep",
        rich_help_panel=METHOD,
        help="Check log-sum-exp, masses and maps of every attention kernel against float64.",
    ),
]


def command(
    device: Device = "auto", deep: Deep = False, as_json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Print versions, devices, attention kernels and what the engine will do with them."""
    check_device(device)
    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    report: dict[str, Any] = environment()
    report |= _devices(device)
    report["kernels"] = [kernel_report(report["device"], dtype) for dtype in ("float32", "bfloat16", "float16")]
    report["embedded_models"] = list(assets.names())

    versions = TextTable(["package", "version"], left=("package", "version"), title="versions")
    for name, version in {"python": report["python"], **report["versions"]}.items():
        versions.add(name, version or "not installed")
    title = f"attention on {report['device']} ({report['device_name']})"
    columns = ["dtype", "kernel", "log-sum-exp", "masses come from"]
    kernels = TextTable(columns, left=columns, title=title)
    for row in report["kernels"]:
        kernels.add(row["dtype"], row["kernel"], "available" if row["logsumexp"] else "no", row["route"])
    found = ", ".join(report["embedded_models"]) or "none found"
    parts: list[Any] = [versions, kernels, f"embedded models: {found}", f"platform: {report['platform']}"]
    if deep:
        report["parity"] = parity(report["device"], output)
        parts += _parity_table(report["parity"])
    output.result(report, parts)
    if deep and any(row["status"] == "fail" for row in report["parity"]):
        raise typer.Exit(1)


def parity(device: str, output: Any) -> list[dict[str, Any]]:
    """Every kernel, precision and case of `attention.kernels` on a device."""
    from mmdit_probe.attention import kernels

    count = len(kernels.KERNELS.get(device.split(":")[0], ("native", kernels.INDICATOR)))
    found = []
    with output.progress.bar("kernels", total=count * len(kernels.DTYPES) * len(kernels.CASES)) as advance:
        for row in kernels.rows(device):
            found.append(row)
            advance()
    return found


def _parity_table(found: list[dict[str, Any]]) -> list[Any]:
    from mmdit_probe.attention.kernels import LIMITS, summary

    table = TextTable(
        ["kernel", "dtype", "log-sum-exp", "mean mass", "map", "passed", "failed", "not run", "remark"],
        left=("kernel", "dtype", "remark"), title="largest errors against float64, by kernel",
        spare=("remark", "not run"),
    )  # fmt: skip
    for row in summary(found):
        errors = ["-" if row[name] is None else f"{row[name]:.1e}" for name in ("lse", "mass", "map")]
        counts = [str(row[status]) for status in ("pass", "fail", "unavailable")]
        table.add(row["kernel"], row["dtype"], *errors, *counts, row["remark"])
    limits = "; ".join(
        f"{dtype}: log-sum-exp {of['lse']:.0e}, mean mass {of['mass']:.0e}, map {of['map']:.0e}"
        for dtype, of in LIMITS.items()
    )
    failed = sum(row["status"] == "fail" for row in found)
    return [table, f"limits: {limits}", f"{counted(failed, 'check')} failed" if failed else "all checks passed"]


def kernel_report(device: str, dtype: str) -> dict[str, Any]:
    """Kernel and log-sum-exp for a call of SD3-medium's shape per head (width 64), tried on the device itself.

    Returns: dtype, kernel ("flash", "efficient", "cudnn", "math" or "unavailable"), logsumexp, route.
    """
    import torch

    from mmdit_probe.attention.call import SDPACall
    from mmdit_probe.attention.exact import attend, kernel

    shape = (1, 2, 64, 64)  # [B, H, N, D]
    try:
        query = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        call = SDPACall(query, query, query)
        name, lse = kernel(call), attend(call)[1]
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        return {"dtype": dtype, "kernel": "unavailable", "logsumexp": False, "route": f"cannot run: {reason}"}
    route = "the kernel's log-sum-exp" if lse is not None else "one more attention with indicator values"
    return {"dtype": dtype, "kernel": name, "logsumexp": lse is not None, "route": route}


def _devices(wanted: str) -> dict[str, Any]:

    import torch

    from mmdit_probe.models.load import pick_device

    device = str(pick_device(wanted))
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    )
    return {
        "device": device,
        "device_name": name,
        "cuda_devices": cuda,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
    }
