"""The machine and the versions that a number was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from fused_lora.ops import cpu_gemm

PACKAGES = ("torch", "triton", "peft", "transformers", "loralib", "torchtune", "torchao", "numpy")


def describe(device: str | torch.device) -> dict:
    """Device, threads, versions, commit and date, as JSON-compatible values.

    ``thread_binding`` is OMP_PROC_BIND. OpenMP reads it when torch is imported, so scripts set it
    before that import.
    """
    return {
        "device": torch.device(device).type,
        "device_name": device_name(device),
        "emulated": emulated(device),
        "threads": torch.get_num_threads(),
        "thread_binding": os.environ.get("OMP_PROC_BIND", "unset"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: str | torch.device) -> str:
    """The vendor's name for the processor or GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def emulated(device: str | torch.device) -> list[str]:
    """The dtypes that the CPU has no instructions for: PyTorch's GEMM is a plain loop there."""
    if torch.device(device).type != "cpu":
        return []
    return [name for name in ("bfloat16", "float16") if getattr(torch, name) in cpu_gemm.EMULATED]


def version_of(package: str) -> str | None:
    """An installed package's version, read without importing it; None if not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> dict:
    """``{"id": …, "dirty": …}`` of this working tree; both None outside a repository."""
    id_ = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"id": id_, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
