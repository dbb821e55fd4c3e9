"""Allocations that fail, as errors that say what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from surgeon.errors import MemoryShortageError


@contextmanager
def memory_advice(where: str, advice: str) -> Iterator[None]:
    """Turns an allocation that failed, in the memory of the machine or of a GPU, into an error with advice.

    Args:
        where: what was being computed.
        advice: what to lower, and what is kept, in sentences.

    Raises:
        MemoryShortageError: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        first = text.splitlines()[0] if text else "no more is there"
        raise MemoryShortageError(f"{where} ran out of memory ({first}). {advice}") from error
