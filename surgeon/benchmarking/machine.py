"""What a measured time depends on besides the model: processor, threads, device and torch."""

import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: str = "cpu") -> dict[str, str | int]:
    """Describes where a measurement is made, in values that can be compared and stored.

    Args:
        device: "cpu" or "cuda".

    Returns:
        Name of the processor, number of torch's threads, device (with the name of the GPU) and version of torch.
    """
    named = f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "device": named, "torch": str(torch.__version__)}


def _cpu_name() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
