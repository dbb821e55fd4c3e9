"""Widths of linears that hardware runs less efficiently than others, from the shapes in the files of a checkpoint."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.benchmarking.sides import text_config
from surgeon.models.checkpoint import read_headers
from surgeon.models.families import Family, QkvLayout, find_family

MLP_MULTIPLE = 64
"""Tile of a matrix product on GPUs; also a whole number of vectors of any CPU."""
MULTIPLE = 8
"""What tensor cores want of every size of a half-precision matrix product."""
_IN_BLOCK = re.compile(r"\.(\d+)\.(.+)\.weight$")

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True, order=True)
class Dislike:
    """Something about the shapes of some blocks.

    Attributes:
        what: the width and why it is bad.
        blocks: indices.
    """

    what: str
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.what} (block{'s' if len(self.blocks) > 1 else ''} {_ranges(self.blocks)})"


def disliked_widths(directory: Path) -> list[Dislike]:
    """Finds disliked widths of a checkpoint.

    Args:
        directory: of the checkpoint; only its configuration and the headers of its weights are read.

    Returns:
        Each with the blocks it is found in. MLP widths that are not a multiple of 64, an odd number of query heads or
        one that the key/value heads do not divide, and any size of a linear that is not a multiple of 8. Heads and MLP
        widths are known only in described families.
    """
    config = text_config(directory)
    family = find_family(str(config.get("model_type")))
    found: dict[str, list[int]] = {}
    for index, shapes in sorted(_blocks(directory).items()):
        for what in dict.fromkeys(_complaints(shapes, family, config)):
            found.setdefault(what, []).append(index)
    return [Dislike(what, tuple(blocks)) for what, blocks in found.items()]


def _blocks(directory: Path) -> dict[int, Shapes]:
    """Shapes of the linears of each block, by name within it."""
    blocks: dict[int, Shapes] = {}
    for name, tensor in read_headers(directory).items():
        match = _IN_BLOCK.search(name)
        if match and len(tensor.shape) == 2:
            blocks.setdefault(int(match[1]), {})[match[2]] = (tensor.shape[0], tensor.shape[1])
    return blocks


def _complaints(shapes: Shapes, family: Family | None, config: Mapping[str, Any]) -> Iterable[str]:
    said: set[int] = set()
    if family is not None and family.mlp.column_linear in shapes:
        width = shapes[family.mlp.column_linear][1]
        if width % MLP_MULTIPLE:
            said.add(width)
            yield f"MLP width {width} is not a multiple of {MLP_MULTIPLE}"
    if family is not None and {family.attention.query, family.attention.key} <= shapes.keys():
        yield from _head_complaints(shapes, family, config)
    for name, shape in shapes.items():
        for size in dict.fromkeys(shape):
            if size % MULTIPLE and size not in said:
                yield f"{name} has a size of {size}, which is not a multiple of {MULTIPLE}"


def _head_complaints(shapes: Shapes, family: Family, config: Mapping[str, Any]) -> Iterable[str]:
    names = family.attention
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fused = 3 if names.layout is QkvLayout.FUSED_PER_HEAD else 1
    n_query, n_kv = (shapes[name][0] // (fused * head_dim) for name in (names.query, names.key))
    if n_query % 2 and n_query > 1:
        yield f"{n_query} query heads is an odd number"
    if n_kv and n_query % n_kv:
        yield f"{n_query} query heads are not a multiple of {n_kv} key/value heads"
    if head_dim % MULTIPLE:
        yield f"head width {head_dim} is not a multiple of {MULTIPLE}"


def _ranges(numbers: Iterable[int]) -> str:
    """``1, 2, 3, 7`` as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
