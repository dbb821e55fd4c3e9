"""The results of one round of Bonsai: priors, losses of sub-models, a ranking of units, a mask.

What goes is set to zero by the same task as after other methods without compensation (`tasks.update`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.bonsai.priors import random_scores, unit_scores
from surgeon.bonsai.regression import RegressionSpec, regress
from surgeon.bonsai.sampling import Candidates, draw_keeps
from surgeon.bonsai.selection import rank_units
from surgeon.bonsai.utility import sub_model_loss, utility_of
from surgeon.choices import Prior, Solver
from surgeon.store import Reference
from tasks.bonsai_round import Round, live_parts, opened_round, stored_candidates
from tasks.context import Context
from tasks.mask import mask_request
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays
from tasks.units import UnitOrder, masks_of, unit_parts
from tasks.weights import read_live

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

_PASSES = ("surgeon.bonsai.parts", "surgeon.shrinking", "tasks.bonsai_round")
PRIOR = Stage("prior", 1, (*_PASSES, "surgeon.bonsai.priors"))
SUB_MODEL = Stage(
    "sub-model",
    1,
    (*_PASSES, "surgeon.bonsai.sampling", "surgeon.bonsai.utility", "surgeon.passes.loss", "tasks.units"),
)
RANKING = Stage(
    "ranking",
    1,
    (
        "surgeon.bonsai.adam",
        "surgeon.bonsai.kendall",
        "surgeon.bonsai.regression",
        "surgeon.bonsai.ridge",
        "surgeon.bonsai.sampling",
        "surgeon.bonsai.selection",
        "surgeon.bonsai.utility",
        "tasks.bonsai_round",
    ),
)


def prior_request(context: Context, work: Round) -> Request:
    """The request for the priors of a round; a random one is keyed by seed and round, and reads nothing."""
    settings = work.settings
    parameters: dict[str, Any] = {"prior": settings.prior}
    if settings.prior is Prior.RANDOM:
        parameters |= {"seed": settings.seed, "round": work.number}
        inputs = {"weights": work.state.digest}
    else:
        parameters |= {"sequences": settings.sequences, "batch_size": context.batch_size}
        inputs = work.inputs
    return Request(PRIOR, parameters, inputs, f"{work.label}/{PRIOR.kind}")


def prior_task(context: Context, work: Round) -> Outcome[Reference]:
    """Scores of all units that live, sub-layer by sub-layer, `[n_live]` float64."""

    def compute() -> Product:
        if work.settings.prior is Prior.RANDOM:
            sizes = [part.units.size for part in live_parts(context, work.state)]
            scores = random_scores(sizes, work.settings.seed, work.number)
        else:
            progress, prior = partial(report, f"{work.label}: prior"), work.settings.prior
            with opened_round(context, work) as opened:
                scores = unit_scores(opened.model, opened.parts, opened.tokens, context.batch_size, prior, progress)
        return Product({"scores": np.concatenate(scores)}, {"n_live": [own.size for own in scores]})

    return produce(context, prior_request(context, work), compute)


def sub_model_request(context: Context, work: Round, prior: Reference, index: int) -> Request:
    """The request for the loss of one sub-model; other utilities and regressions use the same."""
    parameters = {
        **work.sampling,
        "index": index,
        "sequences": work.settings.sequences,
        "batch_size": context.batch_size,
    }
    name = f"{work.label}/{SUB_MODEL.kind}-{index:04d}"
    return Request(SUB_MODEL, parameters, {**work.inputs, "prior": prior.digest}, name)


def sub_model_task(context: Context, work: Round, prior: Reference, index: int) -> Outcome[Reference]:
    """Mean loss of one sub-model, nats per token, in the attribute "loss"; None if nothing stands for election."""

    def compute() -> Product:
        with opened_round(context, work) as opened:
            candidates = opened.candidates(context, work, prior)
            if not any(part.units.size for part in candidates):
                return Product({}, {"loss": None, "n_dropped": 0})
            keeps = draw_keeps(candidates, work.settings.seed, work.number, index)
            loss = sub_model_loss(opened.model, opened.parts, keeps, opened.inputs)
        return Product({}, {"loss": loss, "n_dropped": sum(int((~keep).sum()) for keep in keeps)})

    report(f"{work.label}: sub-models", index, work.settings.sub_models)
    return produce(context, sub_model_request(context, work, prior, index), compute)


def ranking_request(context: Context, work: Round, prior: Reference, sub_models: Sequence[Reference]) -> Request:  # noqa: ARG001
    """The request for the ranking of a round."""
    settings = work.settings
    parameters: dict[str, Any] = {**work.sampling, "sub_models": settings.sub_models}
    if sub_models:
        parameters |= {"utility": settings.utility, "solver": settings.solver, "scope": settings.scope}
        parameters["penalty"] = settings.penalty if settings.solver is Solver.ADAM else None
    inputs: dict[str, str | Sequence[str]] = {
        "weights": work.state.digest,
        "prior": prior.digest,
        "sub_models": [reference.digest for reference in sub_models],
    }
    return Request(RANKING, parameters, inputs, f"{work.label}/{RANKING.kind}")


def ranking_task(
    context: Context, work: Round, prior: Reference, sub_models: Sequence[Reference]
) -> Outcome[Reference]:
    """In which order units go and what each costs, sub-layer by sub-layer; frozen ones last, at an infinite cost."""

    def compute() -> Product:
        parts = live_parts(context, work.state)
        candidates = stored_candidates(context, work, prior, parts)
        coefficients, facts = _coefficients(work, candidates, [ref.attributes["loss"] for ref in sub_models])
        ranked = [rank_units(*pair) for pair in zip(candidates, coefficients, strict=True)]
        orders = [part.units[own.order] for part, own in zip(parts, ranked, strict=True)]
        return Product(
            {"order": np.concatenate(orders), "costs": np.concatenate([own.costs for own in ranked])},
            {
                **facts,
                "n_candidates": sum(part.units.size for part in candidates),
                "n_live": [part.units.size for part in parts],
                "n_frozen": [own.n_frozen for own in ranked],
                "parts": [[part.block, part.sub.kind.value] for part in parts],
            },
        )

    return produce(context, ranking_request(context, work, prior, sub_models), compute)


def ranked_mask_request(work: Round, ranking: Reference) -> Request:
    """The request for the mask of a round."""
    return mask_request([ranking], work.rule, work.label)


def ranked_mask_task(context: Context, work: Round, ranking: Reference) -> Outcome[Reference]:
    """What stays in every linear of the model, as `tasks.mask` has it."""

    def compute() -> Product:
        return Product(*masks_of(context.model, _orders(context, ranking), partial(_live, context, work), work.rule))

    return produce(context, ranked_mask_request(work, ranking), compute)


def _coefficients(
    work: Round, candidates: Sequence[Candidates], losses: Sequence[float | None]
) -> tuple[Sequence[FloatArray], dict[str, Any]]:
    """What each candidate costs, and facts."""
    measured = [loss for loss in losses if loss is not None]
    if not measured:
        return [part.scores[part.units] for part in candidates], {"tau": None, "strength": None, "losses": None}
    settings = work.settings
    spec = RegressionSpec(settings.solver, settings.scope, settings.penalty, settings.seed, work.number)
    utilities = np.array([utility_of(loss, settings.utility) for loss in measured])
    found = regress(candidates, utilities, spec)
    facts = {
        "tau": found.tau,
        "strength": found.strength,
        "prior_scale": found.prior_scale,
        "losses": {"least": min(measured), "mean": float(np.mean(measured)), "most": max(measured)},
    }
    return found.coefficients, facts


def _orders(context: Context, ranking: Reference) -> list[UnitOrder]:
    """The order of every sub-layer of the dense model; an empty one where nothing lives."""
    arrays, facts = read_arrays(context, ranking.key), ranking.attributes
    ends = np.cumsum(facts["n_live"])[:-1]
    split = zip(np.split(arrays["order"], ends), np.split(arrays["costs"], ends), facts["n_frozen"], strict=True)
    found = {tuple(part): UnitOrder(*own) for part, own in zip(facts["parts"], split, strict=True)}
    nothing = UnitOrder(np.zeros(0, dtype=np.int64), np.zeros(0))
    return [found.get((block, sub.kind.value), nothing) for block, sub in unit_parts(context.model)]


def _live(context: Context, work: Round, block: int) -> tuple[Array, Array]:
    """Live rows and columns of the linears of a block, one linear after the other."""
    sets = list(read_live(context, work.state, block).values())
    return np.concatenate([r.numpy() for r, _ in sets]), np.concatenate([c.numpy() for _, c in sets])
