"""Triangles cut out and put together by tensor operations are those of the store, bit for bit."""

import numpy as np
import pytest
import torch

from surgeon.store import SymmetricMatrix
from surgeon.transfer import host_buffer, packed_lower, symmetric_to, symmetric_to_host, to_host, unpacked_lower


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 33])
def test_triangles(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.transfer._STRIP", 8)
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    if n > 3:
        matrix[2, 1], matrix[n - 1, 0], matrix[3, 3] = -0.0, torch.nan, -0.0
    stored = SymmetricMatrix.from_full(matrix.numpy())
    packed = packed_lower(matrix)
    assert packed.numpy().tobytes() == stored.packed.tobytes()
    assert unpacked_lower(packed, n).numpy().tobytes() == stored.to_full().tobytes()


def test_on_a_cpu_nothing_is_copied_that_need_not_be() -> None:
    matrix = torch.tensor([[1.0, 9.0], [2.0, 3.0]])
    assert to_host(matrix).ctypes.data == matrix.data_ptr()
    assert symmetric_to_host(matrix).packed.tolist() == [1.0, 2.0, 3.0]
    assert symmetric_to(symmetric_to_host(matrix), "cpu").tolist() == [[1.0, 2.0], [2.0, 3.0]]
    room = host_buffer((2, 3), matrix)
    assert (room.shape, room.dtype, room.is_pinned()) == ((2, 3), torch.float32, False)
    assert np.shares_memory(room.numpy(), to_host(room))
