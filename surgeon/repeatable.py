"""The same bits again on a GPU: attention's backward pass and sums by index have fast ways that differ each time.

PyTorch has one switch for it in the whole process. It is on as long as anybody needs it, in whatever thread.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from surgeon.choices import Device

_deterministic: Any = torch.utils.deterministic


class _Switch:
    """How many need it, and how it was before; a fact of the process, like the switch itself."""

    lock = threading.Lock()
    users = 0
    before = (False, False, True)


@contextmanager
def repeatable(device: str | torch.device) -> Iterator[None]:
    """Asks a GPU for algorithms that give the same bits again, where it has them.

    Args:
        device: where the work is done; on a CPU nothing changes.
    """
    if torch.device(device).type != Device.CUDA:
        yield
        return
    with _Switch.lock:
        if _Switch.users == 0:
            _Switch.before = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                _deterministic.fill_uninitialized_memory,
            )
            torch.use_deterministic_algorithms(True, warn_only=True)
            _deterministic.fill_uninitialized_memory = False
        _Switch.users += 1
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.users -= 1
            if _Switch.users == 0:
                enabled, warns, fill = _Switch.before
                torch.use_deterministic_algorithms(enabled, warn_only=warns)
                _deterministic.fill_uninitialized_memory = fill
