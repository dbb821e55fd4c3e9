"""Which GPU of a machine a process works on, and how much of its memory is free.

Results are kept apart by the *kind* of device, "cpu" or "cuda"; which of several equal GPUs it was does not matter. A
process claims one when it first needs it, by a lock file that the kernel frees when the process ends, however it ends:
the free one with the lowest index. Where there are more processes than GPUs they share, as evenly as they came.
`CUDA_VISIBLE_DEVICES` counts: what it hides, as Ray and Dask-CUDA do for their workers, is not there.
"""

import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from surgeon.choices import Device
from surgeon.errors import ParameterError

_MOST_SHARING = 64
"""Processes on one GPU at most; more are a mistake."""


@dataclass(frozen=True)
class Claim:
    """A device that a process has claimed.

    Attributes:
        device: "cpu", or the GPU as torch numbers it, such as "cuda:1".
        others: processes that had it before and still do.
        lock: what holds it; None for a CPU.
    """

    device: str
    others: int = 0
    lock: FileLock | None = None


class _Claimed:
    """The claim of this process, a fact of it like its number; a forked child claims for itself."""

    claim: Claim | None = None
    pid: int = 0
    lock = threading.Lock()


def place_of(kind: str) -> str:
    """The device that this process works on: "cpu", or the GPU it has claimed, which it keeps.

    Args:
        kind: "cpu" or "cuda".
    """
    if kind == Device.CPU:
        return kind
    with _Claimed.lock:
        if _Claimed.claim is None or _Claimed.pid != os.getpid():
            _Claimed.claim, _Claimed.pid = claim_device(kind, gpu_names()), os.getpid()
            if _Claimed.claim.others:
                warnings.warn(
                    f"{_Claimed.claim.device} is shared with {_Claimed.claim.others} other process(es) of this user: "
                    "there are more of them than GPUs. Fewer run.workers leave more memory to each.",
                    stacklevel=2,
                )
            _load_solvers(_Claimed.claim.device)
        return _Claimed.claim.device


def _load_solvers(device: str) -> None:
    """Has torch load its solvers for GPUs, which fails when two threads ask for the first solve at the same time."""
    torch.linalg.cholesky(torch.eye(2, dtype=torch.float64, device=device))


def claim_device(kind: str, names: Sequence[str], folder: Path | None = None) -> Claim:
    """Claims the free device with the lowest index, or one of those that the fewest processes have.

    Args:
        kind: "cpu" or "cuda".
        names: one for each device of the kind that is visible, the same in all processes (see `gpu_names`).
        folder: for the lock files; None is one of this user in the directory for temporary files.

    Raises:
        ParameterError: there is no such device, or it is crowded.
    """
    if kind == Device.CPU:
        return Claim(kind)
    if not names:
        raise ParameterError(f"run.device: {kind} was asked for, but this torch sees no such device; use cpu or auto")
    folder = folder or Path(tempfile.gettempdir()) / f"surgeon-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for others in range(_MOST_SHARING):
        for index, name in enumerate(names):
            lock = FileLock(folder / f"{name}.{others}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return Claim(f"{kind}:{index}", others, lock)
    raise ParameterError(
        f"run.workers: each of {len(names)} devices of kind {kind} has {_MOST_SHARING} processes of this user already; "
        "use fewer, or end those that hang"
    )


def gpu_names() -> list[str]:
    """Names of the visible GPUs that stay the same whatever is hidden from a process; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [getattr(each, "uuid", f"{each.name}-{index}") for index, each in enumerate(properties)]
    return [str(name).replace(" ", "-") for name in names]


def free_bytes(kind: str) -> int:
    """Bytes that can still be taken: of the machine, or of the visible GPU that has most, without claiming it.

    What torch holds of a GPU's memory without using it counts as free.
    """
    if kind == Device.CPU:
        return int(psutil.virtual_memory().available)
    free = []
    for index in range(torch.cuda.device_count()):
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        free.append(torch.cuda.mem_get_info(index)[0] + unused)
    return max(free, default=0)


def describe_device(kind: str) -> str:
    """The kind with the model of the first GPU, such as "cuda (NVIDIA H100 80GB HBM3)"; nothing is claimed."""
    return kind if kind == Device.CPU else f"{kind} ({torch.cuda.get_device_name(0)})"
