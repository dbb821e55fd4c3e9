"""Pruned states made by hand: updates with removed rows, columns and, if asked for, single weights."""

import numpy as np
import torch

from tasks.context import ModelState
from tasks.stage import Product, Request, Stage, commit
from tasks.weights import packed_live, read_linears

SEQUENCES = np.random.default_rng(5).integers(4, 260, (6, 12))


def pruned_state(context, single_weights):
    """Row 1 and column 2 of every linear are dead, but for those of the second linear of each block."""
    random = np.random.default_rng(8)
    dense = ModelState(context.model.checkpoint.digest)
    updates = []
    for block in range(context.model.n_blocks):
        arrays, rows, columns, whole = {}, [], [], []
        for place, (name, linear) in enumerate(read_linears(context, dense, block).items()):
            live = np.ones(linear.weight.shape, dtype=bool)
            if place == 1:
                whole.append(name)
            else:
                live[1], live[:, 2] = False, False
            rows.append(live.any(axis=1))
            columns.append(live.any(axis=0))
            if single_weights:
                live &= random.random(live.shape) > 0.3
                arrays[f"{name}/live"] = packed_live(torch.from_numpy(live))
            arrays[f"{name}/weight"] = np.where(live, linear.weight.numpy(), np.float32(0.0))
            if linear.bias is not None:
                arrays[f"{name}/bias"] = linear.bias.numpy() * rows[-1]
        arrays |= {"live_rows": np.concatenate(rows), "live_columns": np.concatenate(columns)}
        facts = {"whole": whole, "linears": {shape.name: {"n_live": 1} for shape in context.model.blocks[block]}}
        request = Request(Stage("update", 1, ()), {"block": block, "by": "hand"}, {}, f"block-{block:02d}/update")
        updates.append(commit(context, request, Product(arrays, facts), 0.0).value)
    return dense.after(updates)
