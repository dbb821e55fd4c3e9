"""Work of costs and updates of one linear with n_out = o rows and n_in = i columns, by what the recipe asks for.

In multiply-adds, float64: a Cholesky factorisation n³/6 (alone it runs at half the rate of products, and so counts
twice), the inverse of its factor n³/3, the inverse of the matrix from it n³/6 (`surgeon/curvature/triangular.py`), a
product of matrices its three sides. Copies are bytes: most steps cut rows and columns out of matrices of the size of a
factor.
"""

from collections.abc import Callable
from dataclasses import dataclass

from surgeon.choices import Correction, Cost, Curvature, Structure, UpdateRule
from surgeon.planning.work import NOTHING, Work
from surgeon.pruning.granularity import is_structured
from surgeon.recipe import Recipe

_CHOLESKY = 2 / 6
"""A factorisation, in n³."""
_SCALES = _CHOLESKY + 1 / 3
"""Diagonal of an inverse, in n³."""
INVERSE = _CHOLESKY + 1 / 3 + 1 / 6
"""A whole inverse, in n³."""
_FACTOR_COPIES = 60
"""Bytes for each entry of a factor that is unpacked, cut to what lives, taken to float64 and damped."""
_WEIGHT_COPIES = 60
"""The same for a weight."""
_STEP_COPIES = 80
"""Bytes for each entry of the inverse that a step of an elimination leaves: rows and columns cut out, the downdate, the
difference (this and the next: fitted to six shapes, within a tenth)."""
_STEP_WEIGHT_COPIES = 180
"""The same for each entry of the weight, and of its product with the factor of gradients."""
_ITERATION_COPIES = 80
"""Bytes for each weight that an iteration of conjugate gradients touches in float32."""
_CHUNK_COPIES = 40
"""Bytes for each entry of the system of a chunk: two gathers and a product."""
_SEQUENTIAL_COPIES = 12
"""Bytes for each weight right of a column in its block, for every column."""


@dataclass(frozen=True)
class Solved:
    """A linear about to be pruned.

    Attributes:
        n_out: live rows.
        n_in: live columns, with the bias.
        removed_rows: fraction of the live rows that this shot takes.
        removed_columns: of the live columns.
        removed_weights: of the live weights.
        n_groups: units that its columns belong to; 0 where units do not go by it.
    """

    n_out: int
    n_in: int
    removed_rows: float = 0.0
    removed_columns: float = 0.0
    removed_weights: float = 0.0
    n_groups: int = 0


def cost_work(recipe: Recipe, linear: Solved) -> Work:
    """Costs of what could go from one linear."""
    o, i = linear.n_out, linear.n_in
    work = _prepared(recipe, o, i)
    structured = is_structured(recipe.granularity)
    if recipe.granularity is Structure.UNITS:
        return work + _unit_costs(recipe, linear)
    if _is_diagonalised(recipe):
        return work + Work.of(solves=2 * (o * i * i + o * o * i))
    energies = (o * i * i * _has_inputs(recipe) + o * o * i * _has_outputs(recipe)) if structured else 0
    scales = _SCALES * (_has_inputs(recipe) * i**3 + _has_outputs(recipe) * o**3) if recipe.cost is Cost.OBS else 0
    return work + Work.of(solves=energies + scales)


def _unit_costs(recipe: Recipe, linear: Solved) -> Work:
    o, i = linear.n_out, linear.n_in
    pulled = Work.of(solves=o * o * i * _has_outputs(recipe))
    if recipe.cost is not Cost.OBS or not _has_inputs(recipe):
        return pulled
    if _is_diagonalised(recipe):
        return pulled + Work.of(solves=o * i * i, copies=8 * o * i)
    rescorings = recipe.units.rescorings if recipe.units else 0
    inverse = Work.of(solves=INVERSE * i**3, copies=48 * i * i)
    return pulled + inverse + elimination_work(o, i, linear.n_groups, rescorings)


def elimination_work(n_out: int, n_in: int, n_groups: int, steps: int) -> Work:
    """All columns going in some steps, each of which downdates the inverse and the weight (`eliminate`)."""
    steps = min(steps, n_groups)
    solves = copies = 0.0
    for step in range(steps):
        m = n_in * (steps - step) / steps
        q = n_in / steps
        k = m - q
        solves += q**3 / 6 + q * q * (n_out + k) + k * q * (k + 2 * n_out)
        copies += _STEP_COPIES * k * k + _STEP_WEIGHT_COPIES * k * n_out
    return Work.of(solves=solves, copies=copies)


def update_work(recipe: Recipe, linear: Solved) -> Work:
    """What is left of one linear adapting to what goes."""
    rule = recipe.update.rule
    o, i = linear.n_out, linear.n_in
    work = _prepared(recipe, o, i)
    if recipe.update.max_iterations:
        return work + _iterations(recipe, linear)
    rules: dict[UpdateRule, Callable[[Recipe, Solved], Work]] = {
        UpdateRule.EXACT: _structures,
        UpdateRule.INDEPENDENT: _structures,
        UpdateRule.CHUNKED: _chunks,
        UpdateRule.SEQUENTIAL: _columns,
    }
    if rule in rules:
        return work + rules[rule](recipe, linear)
    return work + Work.of(products=o * i * i * _has_inputs(recipe) + o * o * i * _has_outputs(recipe))


def _structures(recipe: Recipe, linear: Solved) -> Work:
    o, i = linear.n_out, linear.n_in
    work = NOTHING
    for n, share, other in ((i, linear.removed_columns, o), (o, linear.removed_rows, i)):
        if share:
            q = share * n
            k = n - q
            work += Work.of(solves=_CHOLESKY * n**3 + k * k * q / 2 + other * q * n + o * q * q, copies=24 * n * n)
    if recipe.correction is Correction.NEWTON:
        work += Work.of(solves=_CHOLESKY * (o**3 + i**3) + 2 * (o * o * i + o * i * i))
    return work


def _iterations(recipe: Recipe, linear: Solved) -> Work:
    """Conjugate gradients, as if the tolerance were not reached before the last iteration."""
    o, i = linear.n_out, linear.n_in
    products = (o * o * i * _has_outputs(recipe) + o * i * i * _has_inputs(recipe)) * _products(recipe)
    each = Work.of(products=products, copies=_ITERATION_COPIES * o * i)
    if is_structured(recipe.granularity):  # then in float64, with a preconditioner that is factorised
        each = Work.of(solves=products + o * o * i + o * i * i, copies=2 * _ITERATION_COPIES * o * i)
    return (recipe.update.max_iterations + 1) * each + Work.of(solves=_CHOLESKY * (o**3 + i**3))


def _chunks(recipe: Recipe, linear: Solved) -> Work:
    o, i = linear.n_out, linear.n_in
    n_chunk = recipe.update.max_correlate
    n_chunks = linear.removed_weights * o * i / n_chunk
    inverses = 2 / 3 * (i**3 * _has_inputs(recipe) + o**3 * _has_outputs(recipe))
    spread = (o * o * i * _has_outputs(recipe) + o * i * i) + n_chunks * (o * i + i * i)
    each = Work.of(solves=n_chunk**3 / 6 + n_chunk**2, copies=_CHUNK_COPIES * n_chunk**2 + 24 * o * i)
    return Work.of(solves=inverses + spread) + n_chunks * each


def _columns(recipe: Recipe, linear: Solved) -> Work:
    o, i = linear.n_out, linear.n_in
    width = min(recipe.update.max_correlate, i)
    within = o * i * width / 2
    return Work.of(solves=2 / 3 * i**3 + i**3 / 6, products=within + o * i * i / 2, copies=_SEQUENTIAL_COPIES * within)


def _prepared(recipe: Recipe, n_out: int, n_in: int) -> Work:
    """Weight and factors cut to what lives, and for a curvature with bases these made ready."""
    entries = n_in * n_in * _has_inputs(recipe) + n_out * n_out * _has_outputs(recipe)
    work = Work.of(copies=_FACTOR_COPIES * entries + _WEIGHT_COPIES * n_out * n_in)
    if recipe.curvature.kind is Curvature.EKFAC:
        work += Work.of(solves=n_in**3 + n_out**3)
    if recipe.curvature.kind is Curvature.KRONECKER_SUM:
        rank = recipe.curvature.rank
        cubes = n_in**3 + n_out**3
        work += Work.of(solves=(1 / 6 + 1 / 2 + 2 + 4 * (rank - 1)) * cubes, eigen=cubes)
    return work


def _is_diagonalised(recipe: Recipe) -> bool:
    return recipe.curvature.kind in (Curvature.EKFAC, Curvature.KRONECKER_SUM)


def _has_inputs(recipe: Recipe) -> bool:
    return recipe.curvature.kind not in (Curvature.IDENTITY, Curvature.DIAGONAL)


def _has_outputs(recipe: Recipe) -> bool:
    return _has_inputs(recipe) and recipe.curvature.kind is not Curvature.ACTIVATIONS


def _products(recipe: Recipe) -> int:
    """Pairs of matrix products that applying the curvature once takes."""
    if recipe.curvature.kind is Curvature.EKFAC:
        return 2
    return recipe.curvature.rank
