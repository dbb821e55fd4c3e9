"""Arrays on their way between the memory of a GPU and that of the machine.

From memory that the system may not move (*pinned*) a GPU copies several times as fast, and a symmetric matrix is half
as large as its lower triangle, which a GPU cuts out and puts together in no time. On a CPU nothing is copied that need
not be.
"""

import torch
from numpy.typing import NDArray
from torch import Tensor

from surgeon.store import SymmetricMatrix
from surgeon.store.symmetric import triangle_size

_STRIP = 1024
"""Rows of a triangle that are cut out at a time, so that what is made on the way stays small."""


def to_host(tensor: Tensor) -> NDArray:  # type: ignore[type-arg]
    """The values of a tensor as an array; of one on the CPU the array has the same memory."""
    if not tensor.is_cuda:
        return tensor.detach().numpy()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.numpy()


def host_buffer(shape: tuple[int, ...], near: Tensor) -> Tensor:
    """Room for float32 values `shape` of a pass, in memory that the device of a tensor copies to fast."""
    return torch.empty(shape, dtype=torch.float32, pin_memory=near.is_cuda)


def symmetric_to_host(matrix: Tensor) -> SymmetricMatrix:
    """A symmetric matrix as the store has it.

    Args:
        matrix: `[n, n]` float32; what lies above the diagonal is not read.
    """
    if not matrix.is_cuda:
        return SymmetricMatrix.from_full(matrix.numpy())
    return SymmetricMatrix(to_host(packed_lower(matrix)))


def symmetric_to(stored: SymmetricMatrix, device: str) -> Tensor:
    """A stored symmetric matrix in full on a device, `[n, n]` float32, as a reader of the store gets it."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(stored.to_full())
    return unpacked_lower(torch.from_numpy(stored.packed).to(device), stored.n)


def packed_lower(matrix: Tensor) -> Tensor:
    """Rows of the lower triangle one after the other, `[n (n + 1) / 2]`, of a matrix `[n, n]` on the same device."""
    packed = matrix.new_empty(triangle_size(len(matrix)))
    for start, stop, mask in _strips(matrix):
        packed[triangle_size(start) : triangle_size(stop)] = matrix[start:stop, :stop].masked_select(mask)
    return packed


def unpacked_lower(packed: Tensor, n: int) -> Tensor:
    """The full matrix `[n, n]` of a packed triangle on the same device, mirrored, bit for bit symmetric."""
    matrix = packed.new_empty(n, n)
    for start, stop, mask in _strips(matrix):
        matrix[start:stop, :stop].masked_scatter_(mask, packed[triangle_size(start) : triangle_size(stop)])
        matrix[:start, start:stop] = matrix[start:stop, :start].T
        diagonal = matrix[start:stop, start:stop]
        # A sum of triangles would turn -0.0 into 0.0 and spread NaN; a choice keeps the bits.
        diagonal.copy_(torch.where(mask[:, start:], diagonal, diagonal.T))
    return matrix


def _strips(matrix: Tensor) -> list[tuple[int, int, Tensor]]:
    """First and last row of strips, and which entries up to the last column are of the lower triangle."""
    n, strips = len(matrix), []
    for start in range(0, n, _STRIP):
        stop = min(start + _STRIP, n)
        rows = torch.arange(start, stop, device=matrix.device)[:, None]
        strips.append((start, stop, torch.arange(stop, device=matrix.device)[None, :] <= rows))
    return strips
