"""Passes through the whole model, group by group: boundaries, and statistics of the first level.

One task does all that is missing of a group in one pass and commits an object for each block and kind. What enters the
group from below and from above must be in the store already. Objects that exist are left alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from surgeon.curvature.kronecker_factors import InputFactors, InputObserver, OutputObserver
from surgeon.curvature.observer import LinearObserver
from surgeon.curvature.spec import Statistic
from surgeon.curvature.weight_moments import DiagonalObserver, LossGradientObserver
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import (
    FloatArray,
    GroupPass,
    TokenArray,
    curvature_group,
    forward_group,
    observed_block,
)
from surgeon.passes.targets import TokenTargets
from surgeon.store import Reference
from surgeon.transfer import symmetric_to_host, to_host
from tasks.context import Context
from tasks.curvature import GRADIENT, Measured, boundary_request, gradient_request, statistic_request
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, produce, produce_all, read_arrays
from tasks.weights import open_model

Place = tuple[int, str]
"""A block and the kind of a result."""


@dataclass(frozen=True)
class GroupWork:
    """What is wanted of one group of blocks.

    Attributes:
        group: block indices.
        blocks: those of them whose statistics are wanted.
        statistics: which.
        targets: next tokens of the pass.
        hand_down: whether the gradient at the group's input is wanted for the group below.
    """

    group: range
    blocks: tuple[int, ...]
    statistics: tuple[Statistic, ...]
    targets: TokenTargets
    hand_down: bool = False

    @property
    def needs_gradient(self) -> bool:
        """Whether there may be a backward pass, which needs the gradient from the group above."""
        return self.hand_down or any(statistic is not Statistic.INPUT_FACTORS for statistic in self.statistics)


def boundary_task(context: Context, measured: Measured, group: range) -> Outcome[Reference]:
    """Hidden states that leave a group of blocks, `[n_sequences, length, width]` float32, from those that enter it."""

    def compute() -> Product:
        tokens, first = _tokens(context, measured)
        boundary = _hidden(context, boundary_request(context, measured, group.start)) if group.start else None
        progress = partial(report, f"{measured.label}: forward, blocks {group.start}-{group.stop - 1}")
        model = open_model(context, measured.state)
        return Product({"hidden": forward_group(model, tokens, group, boundary, context.batch_size, progress, first)})

    return produce(context, boundary_request(context, measured, group.stop), compute)


def curvature_requests(context: Context, measured: Measured, work: GroupWork) -> dict[Place, Request]:
    """The requests for what one pass through a group gives."""
    requests: dict[Place, Request] = {}
    if work.hand_down:
        start = work.group.start
        requests[start, GRADIENT.kind] = gradient_request(context, measured, work.targets, start)
    for block in work.blocks:
        for statistic in work.statistics:
            request = statistic_request(context, measured, statistic, block)
            assert request is not None, f"{statistic} is not of the first level"
            requests[block, statistic.value] = request
    return requests


def curvature_task(context: Context, measured: Measured, work: GroupWork) -> Outcome[list[Reference]]:
    """Statistics of the first level of some blocks of a group, and the gradient that leaves it downwards."""

    def compute(missing: Collection[Place]) -> dict[Place, Callable[[], Product]]:
        model = open_model(context, measured.state)
        blocks = {block: observed_block(model, block, measured.linears) for block in work.blocks}
        observers = {
            (block, kind): _OBSERVERS[Statistic(kind)](blocks[block])
            for block, kind in missing
            if kind != GRADIENT.kind
        }
        by_block = {b: [o for (block, _), o in observers.items() if block == b] for b in work.blocks}
        hand_down = len(observers) < len(missing)
        backward = hand_down or any(observer.needs_gradient for observer in observers.values())
        below = run_pass(context, measured, work, model, by_block, needs_gradient=backward)
        makers: dict[Place, Callable[[], Product]] = {
            place: partial(_product, Statistic(place[1]), observer) for place, observer in observers.items()
        }
        if hand_down:
            assert below is not None, "the first group hands nothing down"
            makers[work.group.start, GRADIENT.kind] = partial(Product, {"hidden": below})
        return makers

    requests = curvature_requests(context, measured, work)
    lock = group_lock(context, measured, work.group)
    return produce_all(context, requests, lock, compute, urgent=[(work.group.start, GRADIENT.kind)])


def group_lock(context: Context, measured: Measured, group: range) -> str:
    """Key of the lock of all passes through a group: what two processes want of it may overlap in any way."""
    return boundary_request(context, measured, group.start).key(context)


def run_pass(
    context: Context,
    measured: Measured,
    work: GroupWork,
    model: BlockwiseModel,
    observers: Mapping[int, Sequence[LinearObserver]],
    *,
    needs_gradient: bool = True,
    what: str = "curvature",
) -> FloatArray | None:
    """One pass through a group with what enters it from the store; returns the gradient for the group below."""
    group = work.group
    above = None
    if needs_gradient and group.stop < context.model.n_blocks:
        above = _hidden(context, gradient_request(context, measured, work.targets, group.stop))
    tokens, first = _tokens(context, measured)
    return curvature_group(
        model,
        GroupPass(
            sequences=tokens,
            first_sequence=first,
            group=group,
            batch_size=context.batch_size,
            boundary=_hidden(context, boundary_request(context, measured, group.start)) if group.start else None,
            gradient_above=above,
            targets=work.targets,
            needs_gradient=needs_gradient,
        ),
        observers,
        partial(report, f"{measured.label}: {what}, blocks {group.start}-{group.stop - 1}"),
    )


def _tokens(context: Context, measured: Measured) -> tuple[TokenArray, int]:
    """The sequences that are measured, `[n_sequences, length]`, and the index of the first of them among all."""
    tokens: TokenArray = read_arrays(context, measured.calibration.key)["tokens"]
    first, stop = measured.part or (0, len(tokens))
    return tokens[first:stop], first


def _hidden(context: Context, request: Request) -> FloatArray:
    hidden: FloatArray = read_arrays(context, request.key(context))["hidden"]
    return hidden


_OBSERVERS: dict[Statistic, type[InputObserver | OutputObserver | DiagonalObserver | LossGradientObserver]] = {
    Statistic.INPUT_FACTORS: InputObserver,
    Statistic.OUTPUT_FACTORS: OutputObserver,
    Statistic.DIAGONAL: DiagonalObserver,
    Statistic.LOSS_GRADIENT: LossGradientObserver,
}
_ARRAYS = {Statistic.OUTPUT_FACTORS: "G", Statistic.DIAGONAL: "diagonal", Statistic.LOSS_GRADIENT: "gradient"}


def _product(
    statistic: Statistic, observer: InputObserver | OutputObserver | DiagonalObserver | LossGradientObserver
) -> Product:
    if isinstance(observer, InputObserver):
        return _input_product(observer.result())
    name = _ARRAYS[statistic]
    symmetric = statistic is Statistic.OUTPUT_FACTORS
    arrays = {f"{linear}/{name}": _stored(total, symmetric) for linear, total in observer.result().items()}
    return Product(arrays, {"n_tokens": observer.n_tokens})


def _input_product(factors: InputFactors) -> Product:
    arrays: dict[str, Any] = {}
    for name, activations in factors.activations.items():
        arrays[f"{name}/A"] = _stored(activations, symmetric=True)
        arrays[f"{name}/mean_input"] = _stored(factors.mean_inputs[name], symmetric=False)
    return Product(arrays, {"reads": dict(factors.reads), "n_tokens": factors.n_tokens})


def _stored(tensor: Tensor, symmetric: bool) -> Any:
    return symmetric_to_host(tensor) if symmetric else to_host(tensor)
