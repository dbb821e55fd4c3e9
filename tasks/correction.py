"""First-order correction of a state: low-rank adapters, trained on all blocks at once and absorbed."""

from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from surgeon.correction.adapters import AdapterResult, AdapterSettings, train_adapters
from surgeon.store import Reference
from tasks.context import Context, ModelState
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce_all, read_arrays
from tasks.weights import open_model, read_live_sets

CORRECTION = Stage(
    "correction",
    2,
    (
        "surgeon.correction.adapters",
        "surgeon.correction.masked",
        "surgeon.passes.blockwise",
        "surgeon.passes.evaluation",
        "surgeon.passes.loss",
    ),
)


def correction_requests(
    context: Context, state: ModelState, calibration: Reference, settings: AdapterSettings, label: str
) -> list[Request]:
    """The request for the corrected weights of each block; all depend on the weights of all blocks."""
    inputs = {"weights": state.digest, "calibration": calibration.digest}
    parameters = {**asdict(settings), "seed": list(settings.seeds)}
    return [
        Request(CORRECTION, {"block": b, **parameters}, inputs, f"{label}/block-{b:02d}/correction")
        for b in range(context.model.n_blocks)
    ]


def correction_task(
    context: Context, state: ModelState, calibration: Reference, settings: AdapterSettings, label: str
) -> Outcome[list[Reference]]:
    """Corrected weights of every block, laid out as the updates of the state, so that they can take their place.

    Whether the correction was accepted, its losses and its steps are in the attributes of each, under "correction";
    how much it changed each linear is with the facts of the linear, as "correction_size".

    Raises:
        ValueError: if nothing of the state was pruned yet.
    """
    if not any(state.updates):
        raise ValueError("a state without updates has nothing to correct")

    def compute(missing: Collection[int]) -> dict[int, Callable[[], Product]]:
        tokens = read_arrays(context, calibration.key)["tokens"]
        blocks = range(context.model.n_blocks)
        live = {name: mask for b in blocks for name, mask in _live_weights(context, state, b).items()}
        progress = partial(report, f"{label}: correction")
        result = train_adapters(open_model(context, state), tokens, live, settings, progress)
        return {block: partial(_corrected, context, state, block, result) for block in missing}

    requests = dict(enumerate(correction_requests(context, state, calibration, settings, label)))
    return produce_all(context, requests, requests[0].key(context), compute)


def _live_weights(context: Context, state: ModelState, block: int) -> dict[str, Tensor]:
    """Which weights of the linears of a block live, `[n_out, n_in]` bool by full name."""
    prefix = f"{context.model.blocks_path}.{block}"
    sets = read_live_sets(context, state, block)
    return {f"{prefix}.{name}": live.alive().to(context.place) for name, live in sets.items()}


def _corrected(context: Context, state: ModelState, block: int, result: AdapterResult) -> Product:
    """The update of a block with other weights; everything else in it stays."""
    update = state.update_of(block)
    assert update is not None, "every block has been updated before it is corrected"
    key = update.key
    arrays: dict[str, Any] = read_arrays(context, key)
    attributes = context.store.open().open(key).attributes
    linears = {}
    for shape in context.model.blocks[block]:
        full_name = f"{context.model.blocks_path}.{block}.{shape.name}.weight"
        before, after = arrays[f"{shape.name}/weight"], result.weights[full_name].numpy()
        linears[shape.name] = attributes["linears"][shape.name] | {"correction_size": relative_change(before, after)}
        arrays[f"{shape.name}/weight"] = after
    facts = {
        "accepted": result.accepted,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "steps": result.steps,
        "n_sequences": len(result.sequences),
    }
    return Product(arrays, {**attributes, "linears": linears, "correction": facts})


def relative_change(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Norm of the change of a weight over its norm; 0 for a weight that is zero."""
    norm = np.linalg.norm(before.astype(np.float64))
    return float(np.linalg.norm(after.astype(np.float64) - before) / norm) if norm else 0.0
