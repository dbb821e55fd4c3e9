"""Further passes through one group of blocks: statistics of the second level, which start from the factors of K-FAC."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

from torch import Tensor

from surgeon.curvature.eigenbasis import LiveSets, MomentsObserver, block_eigenbases
from surgeon.curvature.factors import EigenMoments, KroneckerTerms, LinearFactors
from surgeon.curvature.nearest import KroneckerObserver, Products, nearest_terms, next_subspace, starting_subspace
from surgeon.curvature.spec import Statistic
from surgeon.passes.curvature import observed_block
from surgeon.pruning.live import without_dead
from surgeon.store import Reference, Store
from surgeon.transfer import to_host
from tasks.context import Context
from tasks.curvature import STARTING_POINT, Measured, find_statistic, read_statistics, statistic_request
from tasks.measuring import GroupWork, group_lock, run_pass
from tasks.stage import Outcome, Product, Request, produce_all
from tasks.weights import open_model, read_linears


def moments_task(context: Context, measured: Measured, work: GroupWork) -> Outcome[list[Reference]]:
    """Eigenbases and second moments of EKFAC of some blocks of a group, in one pass through it."""

    def compute(missing: Collection[int]) -> dict[int, Callable[[], Product]]:
        model = open_model(context, measured.state)
        observers = {}
        for block in missing:
            observed = observed_block(model, block, measured.linears)
            factors = _starting_factors(context, measured, block, list(observed.linears))
            live = _live_sets(context, measured, block, factors)
            observers[block] = MomentsObserver(observed, block_eigenbases(factors, live, observed.label))
        run_pass(context, measured, work, model, {b: [o] for b, o in observers.items()}, what="moments")
        return {block: partial(_moments_product, observer) for block, observer in observers.items()}

    requests = refining_requests(context, measured, Statistic.MOMENTS, work.blocks)
    return produce_all(context, requests, group_lock(context, measured, work.group), compute)


def kronecker_terms_task(context: Context, measured: Measured, work: GroupWork) -> Outcome[list[Reference]]:
    """The nearest Kronecker sums of some blocks of a group, in as many passes through it as there are iterations."""
    spec = measured.spec

    def compute(missing: Collection[int]) -> dict[int, Callable[[], Product]]:
        model = open_model(context, measured.state)
        blocks = {block: observed_block(model, block, measured.linears) for block in missing}
        subspaces = {}
        for block, observed in blocks.items():
            factors = _starting_factors(context, measured, block, list(observed.linears))
            subspaces[block] = {
                name: starting_subspace(factors[name], spec.rank, linear.bias is not None)
                for name, linear in observed.linears.items()
            }
        products: dict[int, dict[str, Products]] = {}
        for iteration in range(spec.iterations):
            if iteration:
                subspaces = {b: {n: next_subspace(p) for n, p in each.items()} for b, each in products.items()}
            observers = {block: KroneckerObserver(blocks[block], subspaces[block]) for block in missing}
            what = f"Kronecker terms, pass {iteration + 1} of {spec.iterations}"
            run_pass(context, measured, work, model, {b: [o] for b, o in observers.items()}, what=what)
            products = {block: observer.result() for block, observer in observers.items()}
        return {
            block: partial(
                _terms_product, {n: nearest_terms(subspaces[block][n], p) for n, p in products[block].items()}
            )
            for block in missing
        }

    requests = refining_requests(context, measured, Statistic.KRONECKER_TERMS, work.blocks)
    return produce_all(context, requests, group_lock(context, measured, work.group), compute)


def refining_requests(
    context: Context,
    measured: Measured,
    statistic: Statistic,
    blocks: Sequence[int],
    store: Store | None = None,
) -> dict[int, Request]:
    """The requests for a statistic of the second level of some blocks, from what it starts from in a store."""
    requests = {}
    for block in blocks:
        request = statistic_request(context, measured, statistic, block, store)
        assert request is not None, f"the factors that {statistic} of block {block} start from are not in the store"
        requests[block] = request
    return requests


def _starting_factors(
    context: Context, measured: Measured, block: int, linears: Collection[str]
) -> dict[str, LinearFactors]:
    found = {statistic: find_statistic(context, measured, statistic, block) for statistic in STARTING_POINT}
    references = {statistic: reference for statistic, reference in found.items() if reference is not None}
    return dict(read_statistics(context, references, linears))


def _live_sets(
    context: Context, measured: Measured, block: int, factors: dict[str, LinearFactors]
) -> dict[str, LiveSets]:
    """What the costs and updates of a block will find alive."""
    result = {}
    linears = read_linears(context, measured.state, block)
    for name in factors:
        linear = linears[name]
        live = without_dead(linear, factors[name])
        result[name] = LiveSets(live.live_rows, live.live_columns, linear.bias is not None)
    return result


def _moments_product(observer: MomentsObserver) -> Product:
    moments: dict[str, EigenMoments] = observer.result()
    arrays = {}
    sources: dict[int, str] = {}
    reads = {}
    for name, each in moments.items():
        source = sources.setdefault(id(each.basis_in), name)
        reads[name] = source
        if source == name:
            arrays[f"{name}/basis_in"] = _array(each.basis_in)
        arrays[f"{name}/basis_out"] = _array(each.basis_out)
        arrays[f"{name}/moments"] = _array(each.moments)
    return Product(arrays, {"reads": reads, "n_tokens": observer.n_tokens})


def _terms_product(terms: dict[str, KroneckerTerms]) -> Product:
    arrays = {}
    for name, each in terms.items():
        arrays[f"{name}/G"] = _array(each.gradients)
        arrays[f"{name}/A"] = _array(each.activations)
    return Product(arrays)


def _array(tensor: Tensor) -> object:
    return to_host(tensor)
