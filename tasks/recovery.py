"""What recovery training comes to: new weights for the same live sets, laid out as updates."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from surgeon.choices import Recovery
from surgeon.pruning.linear import PrunedLinear
from surgeon.recovery.lora import merged_weights
from surgeon.recovery.state import TrainingState
from surgeon.shrinking import ShrunkModel
from surgeon.store import Reference
from tasks.context import Context, ModelState, StoredBlock
from tasks.correction import relative_change
from tasks.stage import Outcome, Product, Request, Stage, produce_all, read_arrays
from tasks.training import TRAINING_SOURCES, RecoveryWork, opened_training
from tasks.weights import OTHER, read_linears

RECOVERED = Stage("recovered", 1, TRAINING_SOURCES)
TRUNK = "trunk"
"""Names the result of what is outside the blocks; the others are numbers of blocks."""


def kept_blocks(context: Context, state: ModelState) -> list[int]:
    """Indices of the blocks that are left, ascending."""
    return [block for block in range(context.model.n_blocks) if block not in state.removed]


def recovered_requests(context: Context, work: RecoveryWork, best: Reference) -> dict[int | str, Request]:
    """The request for the weights of each block that is left, and of what is outside the blocks if it was trained."""
    inputs = {"weights": work.state.digest, "training": best.digest}
    names: list[int | str] = [*kept_blocks(context, work.state)]
    if work.settings.method is not Recovery.LORA:
        names.append(TRUNK)
    return {
        name: Request(
            RECOVERED,
            {"part": name, "method": str(work.settings.method), "rank": work.settings.rank, "seed": work.settings.seed},
            inputs,
            f"recovery/{TRUNK if name == TRUNK else f'block-{name:02d}'}/recovered",
        )
        for name in names
    }


def recovered_task(context: Context, work: RecoveryWork, best: Reference) -> Outcome[list[Reference]]:
    """New weights of every block that is left, laid out as its update, and of the trunk, by full name.

    Args:
        context: store and model.
        work: what was trained.
        best: the segment after which the validation loss was lowest, with its arrays.
    """

    def compute(missing: Collection[int | str]) -> dict[int | str, Callable[[], Product]]:
        corpus = read_arrays(context, work.corpus.key)
        with opened_training(context, work, corpus["training"]) as opened:
            opened.trainer.restore(TrainingState.from_arrays(read_arrays(context, best.key)))
            opened.trainer.require_masks_kept()
            model = opened.model
            merged = merged_weights(model.model, opened.adapters, opened.live)
        with torch.no_grad():
            for name, weight in merged.items():
                model.model.get_parameter(name).copy_(weight)
        return {
            name: partial(_trunk, model) if isinstance(name, str) else partial(_block, context, work, model, name)
            for name in missing
        }

    requests = recovered_requests(context, work, best)
    return produce_all(context, requests, next(iter(requests.values())).key(context), compute)


def recovered_state(context: Context, work: RecoveryWork, references: list[Reference]) -> ModelState:
    """The state that has these weights in place of its own."""
    stored = [StoredBlock(reference.key, reference.digest) for reference in references]
    blocks = kept_blocks(context, work.state)
    updates = list(work.state.updates or [None] * context.model.n_blocks)
    for block, mine in zip(blocks, stored, strict=False):
        updates[block] = mine
    trunk = stored[-1] if len(stored) > len(blocks) else work.state.trunk
    return ModelState(work.state.checkpoint_digest, tuple(updates), work.state.removed, trunk)


def _trunk(model: ShrunkModel) -> Product:
    return Product({name: tensor.numpy() for name, tensor in model.trunk().items()}, {})


def _block(context: Context, work: RecoveryWork, model: ShrunkModel, block: int) -> Product:
    """The update of a block with other weights and, where all was trained, other norms; what lives is the same."""
    linears, tensors = read_linears(context, work.state, block), model.restored(block)
    arrays, attributes = _before(context, work.state, block, linears)
    facts = {}
    for name, linear in linears.items():
        weight = arrays[f"{name}/weight"]
        after = tensors.pop(f"{name}.weight").numpy()
        arrays[f"{name}/weight"] = np.where(linear.alive().cpu().numpy(), after, weight)
        size = relative_change(weight, arrays[f"{name}/weight"])
        facts[name] = attributes["linears"][name] | {"recovery_size": size}
        if linear.bias is not None:
            after = tensors.pop(f"{name}.bias").numpy()
            arrays[f"{name}/bias"] = np.where(linear.live_rows.cpu().numpy(), after, arrays[f"{name}/bias"])
    if work.settings.method is not Recovery.LORA:
        arrays |= {f"{OTHER}{name}": tensor.numpy() for name, tensor in tensors.items()}
    return Product(arrays, {**attributes, "linears": facts})


def _before(
    context: Context, state: ModelState, block: int, linears: Mapping[str, PrunedLinear]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and attributes of the update of a block; of one as in the checkpoint, those that say that nothing went."""
    update = state.update_of(block)
    if update is not None:
        return dict(read_arrays(context, update.key)), context.store.open().open(update.key).attributes
    arrays: dict[str, Any] = {}
    for name, linear in linears.items():
        arrays[f"{name}/weight"] = linear.weight.cpu().numpy()
        if linear.bias is not None:
            arrays[f"{name}/bias"] = linear.bias.cpu().numpy()
    arrays["live_rows"] = np.ones(sum(linear.weight.shape[0] for linear in linears.values()), dtype=np.bool_)
    arrays["live_columns"] = np.ones(sum(linear.weight.shape[1] for linear in linears.values()), dtype=np.bool_)
    whole = {"sparsity": 0.0, "predicted_cost": 0.0, "relative_change": 0.0}
    facts = {name: {**whole, "n_live": linear.n_weights} for name, linear in linears.items()}
    return arrays, {"linears": facts, "order": list(linears)}
