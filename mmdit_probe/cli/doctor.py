"""`mmdit-probe doctor`: versions, device, the attention kernel that runs, and whether it gives its log-sum-exp."""

from __future__ import annotations

from typing import Any

from mmdit_probe.cli.options import Debug, Device, Json, Quiet


def command(device: Device = "auto", as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print versions, devices, attention kernels and what the engine will do with them."""
    from rich.table import Table

    from mmdit_probe.cli.output import Output
    from mmdit_probe.results import environment

    output = Output(quiet=quiet, as_json=as_json, debug=debug)
    report: dict[str, Any] = environment()
    report |= _devices(device)
    report["kernels"] = [kernel_report(report["device"], dtype) for dtype in ("float32", "bfloat16", "float16")]
    report["embedded_models"] = _embedded()

    versions = Table(title="versions", title_justify="left", show_header=False)
    for name, version in {"python": report["python"], **report["versions"]}.items():
        versions.add_row(name, version or "not installed")
    kernels = Table(title=f"attention on {report['device']} ({report['device_name']})", title_justify="left")
    for column in ("dtype", "kernel", "log-sum-exp", "masses come from"):
        kernels.add_column(column)
    for row in report["kernels"]:
        kernels.add_row(row["dtype"], row["kernel"], "available" if row["logsumexp"] else "no", row["route"])
    found = ", ".join(report["embedded_models"]) or "none found"
    output.result(report, [versions, kernels, f"embedded models: {found}", f"platform: {report['platform']}"])


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
    import platform

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


def _embedded() -> list[str]:
    from mmdit_probe import assets

    return list(assets.names())
