"""What is measured of whole blocks: similarity of hidden states, losses without each block.

Keys hold the weights and the sequences alone, so selectors and amounts share what they have in common.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from surgeon.passes.removal import removal_losses
from surgeon.passes.similarity import measure_blocks, measure_sub_layers
from surgeon.store import Reference
from tasks.context import Context, ModelState
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays
from tasks.units import block_sub_layers
from tasks.weights import open_model

Array = NDArray[np.float64]
_FORWARD = ("surgeon.passes.blockwise", "surgeon.passes.walking")
SIMILARITY = Stage("similarity", 1, (*_FORWARD, "surgeon.passes.similarity"))
SUB_LAYER_SIMILARITY = Stage("sub-layer-similarity", 1, (*_FORWARD, "surgeon.passes.similarity"))
REMOVAL_LOSSES = Stage("removal-losses", 1, (*_FORWARD, "surgeon.passes.removal", "surgeon.passes.loss"))


@dataclass(frozen=True)
class LayerWork:
    """What is measured, on what.

    Attributes:
        state: the model.
        calibration: its sequences.
        label: first part of readable names: "shot-01", for a step of greedy removal "shot-01/step-02".
        before: of greedy removal, the losses of the step before, from which the state follows; None for the first.
    """

    state: ModelState
    calibration: Reference
    label: str
    before: Reference | None = None

    def request(self, context: Context, stage: Stage) -> Request:
        """The request for one of the kinds of results of this module."""
        inputs = {"weights": self.state.digest, "calibration": self.calibration.digest}
        if self.before is not None:
            inputs["before"] = self.before.digest
        return Request(stage, {"batch_size": context.batch_size}, inputs, f"{self.label}/{stage.kind}")


def similarity_request(context: Context, work: LayerWork) -> Request:
    """The request for block influence and angular distances."""
    return work.request(context, SIMILARITY)


def similarity_task(context: Context, work: LayerWork) -> Outcome[Reference]:
    """Block influence `[n_blocks]` and angular distances `[n_blocks + 1, n_blocks + 1]` from one forward pass."""

    def compute() -> Product:
        tokens = read_arrays(context, work.calibration.key)["tokens"]
        progress = partial(report, f"{work.label}: similarity")
        model = open_model(context, work.state)
        found = measure_blocks(model, tokens, context.groups, context.batch_size, progress)
        return Product(
            {"influence": found.influence, "angles": found.angles},
            {"n_tokens": found.n_tokens, "n_sequences": found.n_sequences},
        )

    return produce(context, similarity_request(context, work), compute)


def sub_layer_request(context: Context, work: LayerWork) -> Request:
    """The request for the similarity of attention and MLP apart."""
    return work.request(context, SUB_LAYER_SIMILARITY)


def sub_layer_task(context: Context, work: LayerWork) -> Outcome[Reference]:
    """How much attention and MLP of each block turn the hidden states, `[n_blocks]` each.

    Raises:
        ParameterError: what belongs to the MLP of the model's blocks is not known.
    """

    def compute() -> Product:
        outputs = [block_sub_layers(context.model, block)[1].output for block in range(context.model.n_blocks)]
        tokens = read_arrays(context, work.calibration.key)["tokens"]
        progress = partial(report, f"{work.label}: similarity of attention and MLP")
        model = open_model(context, work.state)
        found = measure_sub_layers(model, tokens, context.groups, context.batch_size, outputs, progress)
        return Product({"attention": found.attention, "mlp": found.mlp}, {"n_tokens": found.n_tokens})

    return produce(context, sub_layer_request(context, work), compute)


def losses_request(context: Context, work: LayerWork) -> Request:
    """The request for the losses without each block."""
    return work.request(context, REMOVAL_LOSSES)


def losses_task(context: Context, work: LayerWork) -> Outcome[Reference]:
    """Mean loss without each block that is left, in the attribute "losses"; None for blocks that are gone."""

    def compute() -> Product:
        tokens = read_arrays(context, work.calibration.key)["tokens"]
        blocks = range(context.model.n_blocks)
        live = [block for block in blocks if block not in work.state.removed]
        progress = partial(report, f"{work.label}: losses without each block")
        model = open_model(context, work.state)
        found = removal_losses(model, tokens, context.groups, context.batch_size, live, progress)
        return Product({}, {"losses": [found.get(block) for block in blocks]})

    return produce(context, losses_request(context, work), compute)


def losses_of(references: list[Reference]) -> Array:
    """Losses of some steps of greedy removal, `[n_steps, n_blocks]` float64; NaN for blocks that were gone."""
    rows = [reference.attributes["losses"] for reference in references]
    return np.array([[np.nan if loss is None else loss for loss in row] for row in rows], dtype=np.float64)
