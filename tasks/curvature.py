"""Boundaries and Kronecker factors, one group of blocks at a time.

Keys do not depend on the grouping: a factor belongs to its block, a boundary or gradient to the block it enters.
"""

import time
from functools import partial

from surgeon.curvature.factors import BlockFactors
from surgeon.passes.curvature import FloatArray, TokenArray, curvature_group, forward_group
from surgeon.store import Reference, Store, SymmetricMatrix
from tasks.context import Context, ModelState
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, commit, produce, read_arrays, readable
from tasks.weights import open_model

_PASSES = ("surgeon.passes.blockwise", "surgeon.passes.curvature", "surgeon.passes.loss")
BOUNDARY = Stage("boundary", 1, _PASSES)
GRADIENT = Stage("gradient", 1, _PASSES)
FACTORS = Stage(
    "factors",
    1,
    (*_PASSES, "surgeon.curvature.gram", "surgeon.curvature.factors", "surgeon.curvature.observer"),
)


def pass_request(
    context: Context, stage: Stage, state: ModelState, calibration: Reference, block: int, label: str
) -> Request:
    """The request for the factors of a block, or for the hidden states or gradient entering it."""
    return Request(
        stage,
        {"block": block, "batch_size": context.batch_size},
        {"weights": state.digest, "calibration": calibration.digest},
        f"{label}/block-{block:02d}/{stage.kind}",
    )


def boundary_task(
    context: Context, state: ModelState, calibration: Reference, group: range, label: str
) -> Outcome[Reference]:
    """Hidden states that leave a group of blocks, `[n_sequences, length, width]` float32, from those that enter it."""

    def compute() -> Product:
        tokens = read_arrays(context, calibration.key)["tokens"]
        boundary = _entering(context, BOUNDARY, state, calibration, group.start) if group.start else None
        progress = partial(report, f"{label}: forward, blocks {group.start}-{group.stop - 1}")
        hidden = forward_group(open_model(context, state), tokens, group, boundary, context.batch_size, progress)
        return Product({"hidden": hidden})

    return produce(context, pass_request(context, BOUNDARY, state, calibration, group.stop, label), compute)


def curvature_task(
    context: Context, state: ModelState, calibration: Reference, group: range, label: str
) -> Outcome[list[Reference]]:
    """Factors of every block of a group, and the gradient that leaves it downwards (not for the first group).

    Boundary and gradient from above must be in the store already. Objects that exist are left alone.
    """
    store = Store(context.store)
    requests = {b: pass_request(context, FACTORS, state, calibration, b, label) for b in group}
    gradient = pass_request(context, GRADIENT, state, calibration, group.start, label)
    everything = [*requests.values(), *([gradient] if group.start else [])]
    with store.lock(requests[group.start].key(context)):
        keys = [request.key(context) for request in everything]
        found = [readable(store, key) for key in keys]
        if all(reference is not None for reference in found):
            return Outcome([ref for ref in found if ref is not None][: len(group)], cached=True, seconds=0.0)
        start = time.perf_counter()
        tokens: TokenArray = read_arrays(context, calibration.key)["tokens"]
        boundary = _entering(context, BOUNDARY, state, calibration, group.start) if group.start else None
        above = None
        if group.stop < context.model.n_blocks:
            above = _entering(context, GRADIENT, state, calibration, group.stop)
        progress = partial(report, f"{label}: curvature, blocks {group.start}-{group.stop - 1}")
        result = curvature_group(
            open_model(context, state), tokens, group, boundary, above, context.batch_size, progress
        )
        if result.gradient_below is not None:
            commit(context, gradient, Product({"hidden": result.gradient_below}), start)
        share = (time.perf_counter() - start) / len(group)
        references = []
        for block in list(result.factors):
            begun = time.perf_counter() - share
            factors = _factor_product(result.factors.pop(block))
            references.append(commit(context, requests[block], factors, begun).value)
        return Outcome(references, cached=False, seconds=time.perf_counter() - start)


def _entering(context: Context, stage: Stage, state: ModelState, calibration: Reference, block: int) -> FloatArray:
    key = pass_request(context, stage, state, calibration, block, "").key(context)
    hidden: FloatArray = read_arrays(context, key)["hidden"]
    return hidden


def _factor_product(factors: BlockFactors) -> Product:
    arrays: dict[str, object] = {}
    for name, activations in factors.activations.items():
        arrays[f"{name}/A"] = SymmetricMatrix.from_full(activations.cpu().numpy())
        arrays[f"{name}/mean_input"] = factors.mean_inputs[name].cpu().numpy()
    for name, gradients in factors.gradients.items():
        arrays[f"{name}/G"] = SymmetricMatrix.from_full(gradients.cpu().numpy())
    return Product(arrays, {"reads": dict(factors.reads), "n_tokens": factors.n_tokens})
