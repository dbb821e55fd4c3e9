"""Which blocks and sub-layers go: a small result made from what was measured, and the sub-layers that go."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.choices import Selector
from surgeon.layers.rule import LayerRule, Selected, select
from surgeon.layers.spec import Reads
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.units import SubLayerKind
from surgeon.pruning.weight_update import UpdateResult
from surgeon.store import Reference
from tasks.context import Context, ModelState, StoredBlock
from tasks.layers import losses_of
from tasks.stage import Outcome, Product, Request, Stage, produce, produce_all, read_arrays
from tasks.units import block_sub_layers
from tasks.update import update_product
from tasks.weights import read_linears

Array = NDArray[np.float64]
SELECTION = Stage(
    "selection",
    1,
    ("surgeon.layers.choosing", "surgeon.layers.dropping", "surgeon.layers.patterns", "surgeon.layers.rule"),
)
DROPPED = Stage("dropped", 1, ("surgeon.pruning.linear", "surgeon.pruning.units"))


def selection_request(rule: LayerRule, measured: Sequence[Reference], label: str) -> Request:
    """The request for what goes.

    Args:
        rule: how much, of what, and how.
        measured: what the selector reads: nothing, the similarity, losses of each step, or the cost of each block.
        label: of the shot.
    """
    parameters = {**asdict(rule), "selector": rule.selector.value}
    return Request(SELECTION, parameters, {"measured": [ref.digest for ref in measured]}, f"{label}/selection")


def selection_task(context: Context, rule: LayerRule, measured: Sequence[Reference], label: str) -> Outcome[Reference]:
    """What goes, in the attributes "removed", "order", "dropped" and "scores"; `selected` reads them."""

    def compute() -> Product:
        return Product({}, _attributes(select(rule, _scores(context, rule, measured))))

    return produce(context, selection_request(rule, measured, label), compute)


def selected(reference: Reference) -> Selected:
    """What goes, read back."""
    found = reference.attributes
    dropped = tuple((block, SubLayerKind(kind)) for block, kind in found["dropped"])
    return Selected(tuple(found["removed"]), tuple(found["order"]), dropped, dict(found["scores"]))


def promised_selection(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a selection that is not made yet: of a pattern as it will be, else as if all scores were equal.

    Args:
        parameters: of its request.
    """
    rule = LayerRule(**{**parameters, "selector": Selector(parameters["selector"])})
    shapes = {
        Selector.ANGULAR: (rule.n_blocks + 1, rule.n_blocks + 1),
        Selector.SLEB: (rule.n_remove or 0, rule.n_blocks),
        Selector.LLM_DROP: (2, rule.n_blocks),
    }
    return _attributes(select(rule, np.zeros(shapes.get(rule.selector, (rule.n_blocks,)))))


def dropped_requests(state: ModelState, dropped: Sequence[tuple[int, SubLayerKind]], label: str) -> list[Request]:
    """The requests for blocks without their attention or without their MLP, ascending."""
    return [
        Request(
            DROPPED,
            {"block": block, "dropped": kind.value},
            {"weights": state.block_digest(block)},
            f"{label}/block-{block:02d}/{DROPPED.kind}",
        )
        for block, kind in sorted(dropped)
    ]


def dropped_task(
    context: Context, state: ModelState, dropped: Sequence[tuple[int, SubLayerKind]], label: str
) -> Outcome[list[Reference]]:
    """Blocks of which the attention or the MLP is gone, laid out as updates: everything of it is zero and dead.

    Returns:
        References in the order of `dropped_requests`.
    """
    requests = {
        block: r for (block, _), r in zip(sorted(dropped), dropped_requests(state, dropped, label), strict=True)
    }
    kinds = dict(dropped)

    def compute(missing: Collection[int]) -> dict[int, Callable[[], Product]]:
        return {block: partial(_without, context, state, block, kinds[block]) for block in missing}

    return produce_all(context, requests, next(iter(requests.values())).key(context), compute)


def state_after(state: ModelState, chosen: Selected, updates: Sequence[Reference], n_blocks: int) -> ModelState:
    """The state without the blocks that go, and with the blocks that lose a sub-layer in the place of their own.

    Args:
        state: the model before.
        chosen: what goes.
        updates: of the blocks that lose a sub-layer, ascending.
        n_blocks: of the model.
    """
    if updates:
        blocks = list(state.updates) or [None] * n_blocks
        for (block, _), reference in zip(sorted(chosen.dropped), updates, strict=True):
            blocks[block] = StoredBlock(reference.key, reference.digest)
        state = replace(state, updates=tuple(blocks))
    return state.without(chosen.removed)


def _scores(context: Context, rule: LayerRule, measured: Sequence[Reference]) -> Array | None:
    """What `select` wants, from the results that the selector reads."""
    reads = rule.spec.reads
    if reads is Reads.NOTHING:
        return None
    if reads is Reads.LOSSES:
        losses = losses_of(list(measured))
        return losses if rule.spec.iterative else np.asarray(losses[0])
    if reads is Reads.COSTS:
        return np.array([reference.attributes["score"] for reference in measured], dtype=np.float64)
    arrays = read_arrays(context, measured[0].key)
    if reads is Reads.SUB_LAYERS:
        return np.stack([arrays["attention"], arrays["mlp"]])
    return np.asarray(arrays["angles" if rule.selector is Selector.ANGULAR else "influence"])


def _attributes(chosen: Selected) -> dict[str, Any]:
    return {
        "removed": list(chosen.removed),
        "order": list(chosen.order),
        "dropped": [[block, kind.value] for block, kind in chosen.dropped],
        "scores": chosen.scores,
    }


def _without(context: Context, state: ModelState, block: int, kind: SubLayerKind) -> Product:
    linears = read_linears(context, state, block)
    sub = next(sub for sub in block_sub_layers(context.model, block) if sub.kind is kind)
    for name in {*sub.rows, sub.output}:
        linears[name] = _gone(linears[name])
    return update_product({name: UpdateResult(linear, 0.0, 0.0) for name, linear in linears.items()})


def _gone(linear: PrunedLinear) -> PrunedLinear:
    return linear.restricted(torch.zeros_like(linear.live_rows), torch.zeros_like(linear.live_columns))
