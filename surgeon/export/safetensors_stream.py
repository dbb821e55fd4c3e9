"""Writing a safetensors file one tensor at a time.

The library writes a file from all of its tensors at once. The format is a header with the place of every tensor, then
their bytes, and places follow from shapes alone; so a tensor need only be in memory while its bytes are written.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written: its shape and type, and how to get it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        """Bytes it takes in the file."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_safetensors(path: Path, plans: Mapping[str, TensorPlan]) -> int:
    """Writes a file; wide types come first, as the library has it, so that every tensor is aligned.

    Args:
        path: of the file.
        plans: name → tensor. Those of the same width are made in this order.

    Returns:
        Bytes of all tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(plans, key=lambda name: -plans[name].dtype.itemsize)
    end = 0
    for name in order:
        plan = plans[name]
        start, end = end, end + plan.n_bytes
        header[name] = {"dtype": _CODES[plan.dtype], "shape": list(plan.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor, plan = plans[name].make(), plans[name]
            assert tuple(tensor.shape) == plan.shape and tensor.dtype is plan.dtype, name
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return end
