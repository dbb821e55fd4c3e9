"""Seconds of a call, the device's work included."""

import time
from collections.abc import Callable

import torch


def seconds_of(body: Callable[[], object], device: str) -> float:
    """Seconds of one call, from when the device has nothing left to do until it has nothing left to do again.

    Args:
        body: what is timed.
        device: "cpu" or "cuda".
    """
    wait_for(device)
    start = time.perf_counter()
    body()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: str) -> None:
    """Waits until a device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
