"""Opening the model of a state: the checkpoint with pruned blocks in place of its own."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from surgeon.models import WeightFiles
from surgeon.passes.blockwise import BlockwiseModel, no_overrides
from surgeon.pruning.linear import PrunedLinear
from surgeon.store import Store
from tasks.context import Context, ModelState


def open_model(context: Context, state: ModelState) -> BlockwiseModel:
    """The model of a state, opened block-wise: blocks read their pruned weights from the store when they are loaded."""
    return BlockwiseModel(
        context.model.checkpoint,
        dtype=context.model.torch_dtype,
        device=context.device,
        overrides=partial(block_tensors, context, state) if state.updates else no_overrides,
    )


def block_tensors(context: Context, state: ModelState, block: int) -> Mapping[str, Tensor]:
    """Pruned weights and biases of a block by their full name, "model.layers.7.mlp.up_proj.weight" say; float32."""
    stored = Store(context.store).open(state.updates[block].key)
    prefix = f"{context.model.blocks_path}.{block}"
    return {
        f"{prefix}.{linear.name}.{part}": torch.from_numpy(stored.array(f"{linear.name}/{part}"))
        for linear in context.model.blocks[block]
        for part in (("weight", "bias") if linear.has_bias else ("weight",))
    }


def read_linears(context: Context, state: ModelState, block: int) -> dict[str, PrunedLinear]:
    """The linears of one block with their live sets, float32, in module order."""
    shapes = context.model.blocks[block]
    prefix = f"{context.model.blocks_path}.{block}"
    if not state.updates:
        names = [f"{prefix}.{s.name}.weight" for s in shapes] + [
            f"{prefix}.{s.name}.bias" for s in shapes if s.has_bias
        ]
        tensors = WeightFiles(context.model.checkpoint).read(names, torch.float32)
        return {
            s.name: PrunedLinear.dense(tensors[f"{prefix}.{s.name}.weight"], tensors.get(f"{prefix}.{s.name}.bias"))
            for s in shapes
        }
    parts = block_tensors(context, state, block)
    stored = Store(context.store).open(state.updates[block].key)
    live_rows = torch.split(torch.from_numpy(stored.array("live_rows")), [s.n_out for s in shapes])
    live_columns = torch.split(torch.from_numpy(stored.array("live_columns")), [s.n_in for s in shapes])
    return {
        s.name: PrunedLinear(parts[f"{prefix}.{s.name}.weight"], parts.get(f"{prefix}.{s.name}.bias"), rows, columns)
        for s, rows, columns in zip(shapes, live_rows, live_columns, strict=True)
    }
