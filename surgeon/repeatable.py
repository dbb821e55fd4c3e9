"""The same bits again on a GPU: attention's backward pass and sums by index have fast ways that differ each time.

PyTorch has one switch for it in the whole process. It is on as long as anybody needs it, in whatever thread.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from surgeon.choices import Device

_deterministic: Any = torch.utils.deterministic
# cuBLAS looks at it once, before its first product: with room of its own for each stream its sums have one order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class _Switch:
    """How many need it, how many of them strictly, and how it was before; a fact of the process, like the switch."""

    lock = threading.Lock()
    users = 0
    strict = 0
    before = (False, False, True)

    @classmethod
    def change(cls, users: int, strict: int) -> None:
        """Some more need it, or fewer."""
        with cls.lock:
            if cls.users == 0:
                enabled, warns = torch.are_deterministic_algorithms_enabled(), _warns()
                cls.before = (enabled, warns, _deterministic.fill_uninitialized_memory)
            cls.users += users
            cls.strict += strict
            if cls.users:
                torch.use_deterministic_algorithms(True, warn_only=cls.strict == 0)
                _deterministic.fill_uninitialized_memory = False
            else:
                torch.use_deterministic_algorithms(cls.before[0], warn_only=cls.before[1])
                _deterministic.fill_uninitialized_memory = cls.before[2]


@contextmanager
def repeatable(device: str | torch.device, *, strict: bool = False) -> Iterator[None]:
    """Asks a GPU for algorithms that give the same bits again, where it has them.

    Args:
        device: where the work is done; on a CPU nothing changes.
        strict: what has no such algorithm is an error of PyTorch. Attention has one only where this is asked for.
    """
    if torch.device(device).type != Device.CUDA:
        yield
        return
    _Switch.change(1, int(strict))
    try:
        yield
    finally:
        _Switch.change(-1, -int(strict))


def _warns() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()
