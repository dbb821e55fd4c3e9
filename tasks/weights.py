"""Opening the model of a state: the checkpoint with pruned blocks in place of its own."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgeon.models import WeightFiles
from surgeon.passes.blockwise import BlockwiseModel, no_overrides
from surgeon.pruning.linear import LiveSet, PrunedLinear
from surgeon.shrinking import ShrunkModel, shrink
from tasks.context import Context, ModelState, split_columns, split_rows
from tasks.stage import read_arrays

OTHER = "other/"
"""Begins the name of an array of a block that is no part of a linear, of a norm say."""


def open_model(context: Context, state: ModelState) -> BlockwiseModel:
    """The model of a state, opened block-wise: blocks read their pruned weights from the store when they are loaded."""
    return BlockwiseModel(
        context.model.checkpoint,
        dtype=context.model.torch_dtype,
        device=context.place,
        overrides=partial(block_tensors, context, state) if any(state.updates) else no_overrides,
        removed=state.removed,
        trunk=trunk_tensors(context, state),
        precision=context.precision,
    )


def block_tensors(context: Context, state: ModelState, block: int) -> Mapping[str, Tensor]:
    """Changed tensors of a block by their full name, "model.layers.7.mlp.up_proj.weight" say; float32."""
    update = state.update_of(block)
    if update is None:
        return {}
    stored = context.store.open().open(update.key)
    prefix = f"{context.model.blocks_path}.{block}"
    tensors = {
        f"{prefix}.{linear.name}.{part}": torch.from_numpy(stored.array(f"{linear.name}/{part}"))
        for linear in context.model.blocks[block]
        for part in (("weight", "bias") if linear.has_bias else ("weight",))
    }
    return tensors | {f"{prefix}.{name}": tensor for name, tensor in read_others(context, state, block).items()}


def read_others(context: Context, state: ModelState, block: int) -> dict[str, Tensor]:
    """Changed tensors of a block that are no part of a linear, by name within the block; float32."""
    if (update := state.update_of(block)) is None:
        return {}
    stored = context.store.open().open(update.key)
    names = [name for name in stored.names() if name.startswith(OTHER)]
    return {name.removeprefix(OTHER): torch.from_numpy(stored.array(name)) for name in names}


def trunk_tensors(context: Context, state: ModelState) -> Mapping[str, Tensor]:
    """Changed tensors outside the blocks by their full name; float32."""
    if state.trunk is None:
        return {}
    return {name: torch.from_numpy(array) for name, array in read_arrays(context, state.trunk.key).items()}


def read_linears(context: Context, state: ModelState, block: int) -> dict[str, PrunedLinear]:
    """The linears of one block with their live sets, float32, in module order, on the context's device."""
    shapes = context.model.blocks[block]
    names = [f"{context.model.blocks_path}.{block}.{shape.name}" for shape in shapes]
    if state.update_of(block) is not None:
        tensors = block_tensors(context, state, block)
    else:
        parts = [f"{n}.weight" for n in names] + [f"{n}.bias" for n, s in zip(names, shapes, strict=True) if s.has_bias]
        tensors = WeightFiles(context.model.checkpoint).read(parts, torch.float32)
    on = context.place
    result = {}
    for shape, name, live in zip(shapes, names, read_live_sets(context, state, block).values(), strict=True):
        bias = tensors[f"{name}.bias"].to(on) if shape.has_bias else None
        weights = None if live.weights is None else live.weights.to(on)
        weight, rows, columns = tensors[f"{name}.weight"].to(on), live.rows.to(on), live.columns.to(on)
        result[shape.name] = PrunedLinear(weight, bias, rows, columns, weights)
    return result


def read_live(context: Context, state: ModelState, block: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Live rows `[n_out]` and columns `[n_in]` of the linears of one block, bool, on the CPU; no weights are read."""
    shapes = context.model.blocks[block]
    if (update := state.update_of(block)) is None:
        whole = [(torch.ones(s.n_out, dtype=torch.bool), torch.ones(s.n_in, dtype=torch.bool)) for s in shapes]
        return {shape.name: sets for shape, sets in zip(shapes, whole, strict=True)}
    stored = context.store.open().open(update.key)
    rows = split_rows(shapes, stored.array("live_rows"))
    columns = split_columns(shapes, stored.array("live_columns"))
    return {
        shape.name: (torch.from_numpy(r), torch.from_numpy(c))
        for shape, r, c in zip(shapes, rows, columns, strict=True)
    }


def read_live_sets(context: Context, state: ModelState, block: int) -> dict[str, LiveSet]:
    """What of the linears of one block lives, single weights too; no weights are read."""
    sets = read_live(context, state, block)
    update = state.update_of(block)
    if update is None:
        return {name: LiveSet(rows, columns) for name, (rows, columns) in sets.items()}
    stored = context.store.open().open(update.key)
    packed = set(stored.names())
    result = {}
    for shape in context.model.blocks[block]:
        part = f"{shape.name}/live"
        weights = unpacked_live(stored.array(part), shape.n_in) if part in packed else None
        result[shape.name] = LiveSet(*sets[shape.name], weights)
    return result


def open_shrunk(context: Context, state: ModelState) -> ShrunkModel:
    """The model of a state as a whole in memory, physically smaller where whole units or blocks are gone."""
    return shrink(open_model(context, state), partial(read_live_sets, context, state))


def packed_live(live: Tensor) -> NDArray[np.uint8]:
    """Live weights `[n_out, n_in]` bool as bits, eight to a byte of a row: `[n_out, ceil(n_in / 8)]`."""
    return np.packbits(live.cpu().numpy(), axis=1)


def unpacked_live(packed: NDArray[np.uint8], n_in: int) -> Tensor:
    """Live weights `[n_out, n_in]` bool from their bits."""
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=n_in).astype(np.bool_))
