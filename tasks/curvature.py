"""Statistics of the calibration text, one stored object a block and kind, and what reads them back.

Keys do not depend on the grouping of blocks: a statistic belongs to its block, a boundary or gradient to the block it
enters. Nor does one depend on what else was computed in the same pass, so that methods share what they have in common.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgeon.choices import Targets
from surgeon.curvature.factors import EigenMoments, KroneckerTerms, LinearFactors
from surgeon.curvature.spec import CurvatureSpec, Statistic
from surgeon.passes.groups import shards
from surgeon.passes.targets import EMPIRICAL, TokenTargets
from surgeon.store import Layout, Reference, Store, StoredObject, SymmetricMatrix
from surgeon.transfer import symmetric_to
from tasks.context import Context, ModelState
from tasks.stage import Request, Stage

_PASSES = ("surgeon.passes.blockwise", "surgeon.passes.curvature", "surgeon.passes.loss", "surgeon.passes.targets")
_OBSERVED = (*_PASSES, "surgeon.curvature.observer", "surgeon.curvature.gram")
_FACTORS = (*_OBSERVED, "surgeon.curvature.kronecker_factors")
_WEIGHTS = (*_OBSERVED, "surgeon.curvature.weight_moments")
_LIVE = ("surgeon.pruning.live", "surgeon.pruning.linear")
BOUNDARY = Stage("boundary", 1, _PASSES)
GRADIENT = Stage("gradient", 1, _PASSES)
INPUT_FACTORS = Stage(Statistic.INPUT_FACTORS.value, 1, _FACTORS)
OUTPUT_FACTORS = Stage(Statistic.OUTPUT_FACTORS.value, 1, _FACTORS)
DIAGONAL = Stage(Statistic.DIAGONAL.value, 1, _WEIGHTS)
LOSS_GRADIENT = Stage(Statistic.LOSS_GRADIENT.value, 1, _WEIGHTS)
MOMENTS = Stage(
    Statistic.MOMENTS.value,
    1,
    (*_OBSERVED, *_LIVE, "surgeon.curvature.factors", "surgeon.curvature.eigenbasis"),
)
KRONECKER_TERMS = Stage(
    Statistic.KRONECKER_TERMS.value,
    1,
    (*_OBSERVED, "surgeon.curvature.factors", "surgeon.curvature.nearest"),
)
STAGES = {
    Statistic(stage.kind): stage
    for stage in (INPUT_FACTORS, OUTPUT_FACTORS, DIAGONAL, LOSS_GRADIENT, MOMENTS, KRONECKER_TERMS)
}
FIRST_LEVEL = (Statistic.INPUT_FACTORS, Statistic.OUTPUT_FACTORS, Statistic.DIAGONAL, Statistic.LOSS_GRADIENT)
"""Computed by the pass that goes through the whole model."""
SECOND_LEVEL = (Statistic.MOMENTS, Statistic.KRONECKER_TERMS)
"""Computed by further passes through a group of blocks, from the factors of K-FAC."""
STARTING_POINT = (Statistic.INPUT_FACTORS, Statistic.OUTPUT_FACTORS)
"""What those of the second level start from."""


@dataclass(frozen=True)
class Measured:
    """What statistics are taken of.

    Attributes:
        state: the model.
        calibration: its sequences.
        spec: targets, rank and iterations.
        label: readable name of the shot.
        linears: names of those that are measured in every block; None for all.
        shards: parts of the sequences whose statistics are computed apart and then added up.
        part: first sequence of one such part, and the one after its last; None for all sequences.
    """

    state: ModelState
    calibration: Reference
    spec: CurvatureSpec
    label: str
    linears: tuple[str, ...] | None = None
    shards: int = 1
    part: tuple[int, int] | None = None

    def parts(self, n_sequences: int) -> tuple["Measured", ...]:
        """What is measured apart: for each shard its sequences, in order; all of them if there is one shard.

        Their number is in the keys of the sums and their sequences are in those of the parts: both change last bits.

        Args:
            n_sequences: of the calibration.

        Raises:
            ParameterError: more shards than sequences.
        """
        if self.shards == 1:
            return (self,)
        return tuple(
            replace(self, shards=1, part=(part.start, part.stop), label=f"{self.label}/part-{index:02d}")
            for index, part in enumerate(shards(n_sequences, self.shards))
        )

    @property
    def portion(self) -> dict[str, Any]:
        """The parameter of keys that says which sequences a result is of; none where it is of all."""
        return {} if self.part is None else {"sequences": list(self.part)}

    def targets(self, statistic: Statistic) -> TokenTargets:
        """Next tokens a statistic is taken for: the gradient of the loss is that of the text, whatever the curvature.

        (The mean gradient over the model's own draws is zero but for noise.)
        """
        spec = self.spec
        if statistic is Statistic.LOSS_GRADIENT or spec.targets is Targets.EMPIRICAL:
            return EMPIRICAL
        return TokenTargets(spec.targets, spec.draws, spec.seed)


def boundary_request(context: Context, measured: Measured, block: int) -> Request:
    """The request for the hidden states that enter a block."""
    return _request(context, BOUNDARY, measured, block, {}, {})


def gradient_request(context: Context, measured: Measured, targets: TokenTargets, block: int) -> Request:
    """The request for the gradient of the loss at the input of a block."""
    parameters = targets.parameters if targets.sampled else {}
    return _request(context, GRADIENT, measured, block, parameters, {})


def statistic_request(
    context: Context, measured: Measured, statistic: Statistic, block: int, store: Store | None = None
) -> Request | None:
    """The request for a statistic of a block; None if what it starts from has never been computed.

    Args:
        context: where.
        measured: what statistics are taken of.
        statistic: which.
        block: index.
        store: where to look for what it starts from; None opens that of the context.
    """
    parameters: dict[str, Any] = {} if measured.linears is None else {"linears": list(measured.linears)}
    if measured.shards > 1:
        parameters["shards"] = measured.shards
    if statistic is not Statistic.INPUT_FACTORS:
        parameters |= measured.targets(statistic).parameters
    if statistic is Statistic.KRONECKER_TERMS:
        parameters |= {"rank": measured.spec.rank, "iterations": measured.spec.iterations}
    inputs = {}
    if statistic in SECOND_LEVEL:
        for start in STARTING_POINT:
            reference = find_statistic(context, measured, start, block, store)
            if reference is None:
                return None
            inputs[start.value] = reference.digest
    return _request(context, STAGES[statistic], measured, block, parameters, inputs)


def find_statistic(
    context: Context, measured: Measured, statistic: Statistic, block: int, store: Store | None = None
) -> Reference | None:
    """The reference of a statistic that was computed once, whether or not its arrays are still there."""
    request = statistic_request(context, measured, statistic, block, store)
    return None if request is None else (store or context.store.open()).lookup(request.key(context))


def _request(
    context: Context,
    stage: Stage,
    measured: Measured,
    block: int,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> Request:
    return Request(
        stage,
        {"block": block, "batch_size": context.batch_size, **measured.portion, **parameters},
        {"weights": measured.state.digest, "calibration": measured.calibration.digest, **inputs},
        f"{measured.label}/block-{block:02d}/{stage.kind}",
    )


def read_statistics(
    context: Context, references: Mapping[Statistic, Reference], linears: Collection[str]
) -> Iterator[tuple[str, LinearFactors]]:
    """Statistics of some linears of one block from the store, on the context's device, one linear at a time.

    Args:
        context: store and device.
        references: of one block, by kind; what is not there is None in the result.
        linears: names.

    Yields:
        Name and statistics, in the order given. What linears have in common is read once and is one tensor.
    """
    store = context.store.open()
    stored = {statistic: _Tensors(store.open(ref.key), context.place) for statistic, ref in references.items()}
    for name in linears:
        yield name, _linear_factors(stored, name)


@dataclass
class _Tensors:
    """Arrays of a stored object on a device; those that linears share are kept."""

    stored: StoredObject
    device: str
    _shared: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if self.stored.array_info(name).layout is not Layout.LOWER_TRIANGLE:
            return torch.from_numpy(self.stored.array(name)).to(self.device)
        triangle = self.stored.as_stored(name)
        assert isinstance(triangle, SymmetricMatrix), "its layout says so"
        return symmetric_to(triangle, self.device)

    def shared(self, linear: str, part: str) -> Tensor:
        """An array that is stored under the name of the first linear that has it."""
        name = f"{self.stored.attributes['reads'][linear]}/{part}"
        if name not in self._shared:
            self._shared[name] = self[name]
        return self._shared[name]


def _linear_factors(stored: Mapping[Statistic, _Tensors], name: str) -> LinearFactors:
    parts: dict[str, Any] = {}
    if inputs := stored.get(Statistic.INPUT_FACTORS):
        parts |= {"activations": inputs.shared(name, "A"), "mean_input": inputs.shared(name, "mean_input")}
    if outputs := stored.get(Statistic.OUTPUT_FACTORS):
        parts["gradients"] = outputs[f"{name}/G"]
    if moments := stored.get(Statistic.MOMENTS):
        basis_in = moments.shared(name, "basis_in")
        parts["moments"] = EigenMoments(moments[f"{name}/basis_out"], basis_in, moments[f"{name}/moments"])
    if terms := stored.get(Statistic.KRONECKER_TERMS):
        parts["terms"] = KroneckerTerms(terms[f"{name}/G"], terms[f"{name}/A"])
    if diagonal := stored.get(Statistic.DIAGONAL):
        parts["diagonal"] = diagonal[f"{name}/diagonal"]
    if gradient := stored.get(Statistic.LOSS_GRADIENT):
        parts["loss_gradient"] = gradient[f"{name}/gradient"]
    return LinearFactors(**parts)
