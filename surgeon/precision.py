"""In which precision a GPU multiplies float32 matrices.

TensorFloat-32 keeps 10 bits of each factor's mantissa and sums in float32: several times as fast as float32, and
enough for the passes of a model. PyTorch has one switch for it in the whole process. So whoever wants it holds a lock,
and puts the switch back: outside such a block nothing has changed, and no solve and no sum of statistics ever sees it.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from surgeon.choices import Precision

_SWITCH = threading.RLock()
_NAMES = {Precision.FLOAT32: "highest", Precision.TF32: "high"}


def precision_of(dtype: str) -> Precision:
    """The precision of passes that compute in "float32", "tf32", "bfloat16" or "float16", as keys name it."""
    return Precision.TF32 if dtype == Precision.TF32 else Precision.FLOAT32


@contextmanager
def only_tf32_here(is_wanted: bool) -> Iterator[None]:
    """Keeps other threads that want TensorFloat-32 out, for work that goes back and forth between it and float32."""
    with ExitStack() as stack:
        if is_wanted:
            stack.enter_context(_SWITCH)
        yield


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Products of float32 matrices on a GPU are of this precision inside; on a CPU they are always of float32.

    A block of float32 within one of TensorFloat-32 is exact. (Backward passes run in threads of PyTorch's own, so a
    switch by thread would miss them.)
    """
    before, wanted = torch.get_float32_matmul_precision(), _NAMES[precision]
    with only_tf32_here(precision is Precision.TF32):
        if before == wanted:
            yield
            return
        torch.set_float32_matmul_precision(wanted)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
