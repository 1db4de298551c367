"""What this machine has for the engine: devices, attention backends, and why the others are missing."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from engine.attention.choice import attention_report

_GIB = 2**30


def diagnose() -> list[str]:
    """Lines for a person to read."""
    lines = [
        f"pacer {_version('pacer')}, Python {platform.python_version()}, {os.cpu_count()} CPUs",
        f"torch {torch.__version__}, triton {_version('triton')}, vllm {_version('vllm')}",
    ]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not devices:
        lines.append("no CUDA device: the engine runs on the CPU")
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        lines.append(
            f"{device}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
        )
    lines.append("attention backends, best first:")
    for name, usable, detail in attention_report(devices[0] if devices else torch.device("cpu")):
        lines.append(f"  {'yes' if usable else 'no ':<3} {name}: {detail}")
    lines.append("on CUDA, sdpa waits for the host in every step: it is slower, and look-ahead gains nothing with it")
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
