from dataclasses import dataclass

import numpy as np
import pytest
import torch

from surgeon.choices import Cost, Ranking, Structure, UpdateRule
from surgeon.errors import NonFiniteError
from surgeon.pruning.allocation import Allocation, Candidates, allocate
from surgeon.pruning.costs import structure_costs
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.structure_update import update_structures
from surgeon.recipe import UpdateSpec
from tests.surgeon.pruning.dense import DAMPING, WHERE, factors_from, kfac_linear, random

BOTH = Structure.ROWS_AND_COLUMNS
STRUCTURES = [structure for structure in Structure if structure is not Structure.BLOCKS]
EVERY_RULE = pytest.mark.parametrize(
    ("structure", "ranking"),
    [pytest.param(structure, ranking, id=f"{structure}-{ranking}") for structure in STRUCTURES for ranking in Ranking],
)


def candidates(
    name: str,
    rows: list[float],
    columns: list[float],
    dead_rows: tuple[int, ...] = (),
    dead_columns: tuple[int, ...] = (),
) -> Candidates:
    return Candidates(
        name,
        np.array(rows, dtype=np.float64),
        np.array(columns, dtype=np.float64),
        np.array([r not in dead_rows for r in range(len(rows))]),
        np.array([c not in dead_columns for c in range(len(columns))]),
    )


def random_candidates(generator: np.random.Generator, ties: bool) -> list[Candidates]:
    """One to four linears of one to seven rows and columns, some removed before, perhaps with many equal costs."""
    linears = []
    for i in range(generator.integers(1, 5)):
        sizes = generator.integers(1, 8, size=2)
        costs = [
            generator.integers(0, 4, n).astype(np.float64) if ties else generator.exponential(size=n) for n in sizes
        ]
        live = [generator.random(n) > generator.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1]) for n in sizes]
        costs = [np.where(alive, cost, 0.0) for alive, cost in zip(live, costs, strict=True)]
        linears.append(Candidates(f"linear {i}", costs[0], costs[1], live[0], live[1]))
    return linears


@dataclass(frozen=True)
class Expected:
    rows: list[list[bool]]
    columns: list[list[bool]]
    sparsity: float
    removed: list[tuple[float, int, bool, int]]
    cost: float
    sparsity_before_last: float


def sparsity_of(rows: list[list[bool]], columns: list[list[bool]]) -> float:
    total = sum(len(r) * len(c) for r, c in zip(rows, columns, strict=True))
    return (total - sum(sum(r) * sum(c) for r, c in zip(rows, columns, strict=True))) / total


def one_at_a_time(linears: list[Candidates], target: float, structure: Structure, ranking: Ranking) -> Expected:
    """Removes structures in the order of the ranking and counts again after each, until the target is met."""
    rows, columns = [c.live_rows.tolist() for c in linears], [c.live_columns.tolist() for c in linears]
    queue = []
    for i, c in enumerate(linears):
        n_rows, n_columns = sum(rows[i]), sum(columns[i])
        if n_rows == 0 or n_columns == 0:
            continue
        if structure is not Structure.COLUMNS:
            for j in range(len(rows[i])):
                if rows[i][j]:
                    price = c.row_costs[j] / (n_columns if ranking is Ranking.COST_PER_WEIGHT else 1)
                    queue.append((price, i, False, j, c.row_costs[j]))
        if structure is not Structure.ROWS:
            for j in range(len(columns[i])):
                if columns[i][j]:
                    price = c.column_costs[j] / (n_rows if ranking is Ranking.COST_PER_WEIGHT else 1)
                    queue.append((price, i, True, j, c.column_costs[j]))
    removed, cost, before_last = [], 0.0, 0.0
    for price, i, is_column, j, its_cost in sorted(queue):
        if sparsity_of(rows, columns) >= target - 1e-9:
            break
        before_last = sparsity_of(rows, columns)
        (columns if is_column else rows)[i][j] = False
        removed.append((price, i, is_column, j))
        cost += its_cost
    return Expected(rows, columns, sparsity_of(rows, columns), removed, cost, before_last)


def live(allocation: Allocation) -> tuple[list[list[bool]], list[list[bool]]]:
    return [r.tolist() for r in allocation.live_rows], [c.tolist() for c in allocation.live_columns]


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@EVERY_RULE
def test_allocation_is_that_of_removing_one_structure_at_a_time(
    structure: Structure, ranking: Ranking, ties: bool
) -> None:
    generator = np.random.default_rng([STRUCTURES.index(structure), list(Ranking).index(ranking), ties])
    n_removed = []
    for _ in range(150):
        linears = random_candidates(generator, ties)
        n_total = sum(c.n_weights for c in linears)
        target = float(generator.choice([generator.uniform(0, 1), generator.integers(1, n_total + 1) / n_total]))
        found = allocate(linears, target, structure, ranking)
        expected = one_at_a_time(linears, target, structure, ranking)
        assert live(found) == (expected.rows, expected.columns)
        assert found.n_removed == len(expected.removed)
        assert found.sparsity == pytest.approx(expected.sparsity, abs=1e-12)
        assert found.predicted_cost == pytest.approx(expected.cost, rel=1e-12)
        assert found.threshold == (expected.removed[-1][0] if expected.removed else 0.0)
        assert found.sparsity >= target - 1e-9, "met from above"
        assert not expected.removed or expected.sparsity_before_last < target, "to within one structure"
        n_removed.append(found.n_removed)
    assert min(n_removed) == 0
    assert max(n_removed) > 10


@EVERY_RULE
def test_masks_shrink_as_the_target_grows_and_nothing_revives(structure: Structure, ranking: Ranking) -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        linears = random_candidates(generator, ties=True)
        before = [c.live_rows for c in linears], [c.live_columns for c in linears]
        sparsity = -1.0
        for target in np.linspace(0.01, 0.99, 12):
            found = allocate(linears, float(target), structure, ranking)
            for masks, earlier in zip((found.live_rows, found.live_columns), before, strict=True):
                assert all(not (now & ~then).any() for now, then in zip(masks, earlier, strict=True))
            assert found.sparsity >= sparsity
            before, sparsity = (list(found.live_rows), list(found.live_columns)), found.sparsity


def test_a_row_frees_fewer_weights_once_columns_have_gone() -> None:
    linears = [candidates("fc1", rows=[3.0, 9.0, 9.0], columns=[1.0, 2.0, 9.0, 9.0])]
    found = allocate(linears, 8 / 12, BOTH, Ranking.COST)
    assert live(found) == ([[False, True, True]], [[False, False, True, True]])
    assert found.sparsity == pytest.approx(8 / 12), "two columns free 3 each, then the row 2, not 4"
    assert (found.n_removed, found.threshold, found.predicted_cost) == (3, 3.0, 6.0)
    assert allocate(linears, 8.1 / 12, BOTH, Ranking.COST).n_removed == 4


def test_equal_keys_go_by_linear_then_rows_before_columns_then_index() -> None:
    linears = [candidates(f"linear {i}", rows=[1.0, 1.0], columns=[1.0, 1.0]) for i in range(2)]
    states = []
    for n_weights in range(1, 9):
        rows, columns = live(allocate(linears, n_weights / 8, BOTH, Ranking.COST))
        states.append((rows, columns))
    on, off = True, False
    first, second = ([off, on], [on, on]), ([off, off], [on, on])
    assert states[0] == states[1] == ([first[0], [on, on]], [first[1], [on, on]])
    assert states[2] == states[3] == ([second[0], [on, on]], [second[1], [on, on]])
    # The columns of the first linear come next and free nothing any more; then the rows of the second.
    assert states[4] == states[5] == ([[off, off], [off, on]], [[off, off], [on, on]])
    assert states[6] == states[7] == ([[off, off], [off, off]], [[off, off], [on, on]])


def test_the_order_of_ties_does_not_depend_on_where_they_stand_in_memory() -> None:
    generator = np.random.default_rng(3)
    n = 3000
    linears = [candidates("fc1", rows=[1.0] * n, columns=list(generator.uniform(2, 3, 2)))]
    found = allocate(linears, 0.5, BOTH, Ranking.COST)
    assert found.live_rows[0].tolist() == [False] * (n // 2) + [True] * (n // 2)


def test_cost_per_weight_prefers_what_frees_more() -> None:
    wide = candidates("wide", rows=[2.0, 9.0], columns=[90.0] * 8)
    narrow = candidates("narrow", rows=[1.0, 9.0], columns=[90.0] * 2)
    by_cost = allocate([wide, narrow], 0.1, Structure.ROWS, Ranking.COST)
    per_weight = allocate([wide, narrow], 0.1, Structure.ROWS, Ranking.COST_PER_WEIGHT)
    assert live(by_cost)[0] == [[True, True], [False, True]]
    assert (by_cost.threshold, by_cost.predicted_cost) == (1.0, 1.0)
    assert live(per_weight)[0] == [[False, True], [True, True]]
    assert (per_weight.threshold, per_weight.predicted_cost) == (2.0 / 8, 2.0)


def test_weights_are_counted_at_the_live_sizes() -> None:
    """Per weight, a row of the half-removed linear costs 2/4 and not 2/8."""
    half = candidates("half", rows=[2.0, 9.0], columns=[90.0] * 8, dead_columns=(0, 2, 4, 6))
    whole = candidates("whole", rows=[3.0, 9.0], columns=[90.0] * 8)
    found = allocate([half, whole], 9 / 32, Structure.ROWS, Ranking.COST_PER_WEIGHT)
    assert live(found)[0] == [[True, True], [False, True]]
    assert found.threshold == 3.0 / 8


@pytest.mark.parametrize("ranking", Ranking)
def test_only_rows_or_only_columns_go_if_asked(ranking: Ranking) -> None:
    linears = [candidates("fc1", rows=[5.0, 6.0, 7.0, 8.0], columns=[1.0, 2.0, 3.0, 4.0])]
    rows = allocate(linears, 0.5, Structure.ROWS, ranking)
    assert live(rows) == ([[False, False, True, True]], [[True] * 4])
    columns = allocate(linears, 0.5, Structure.COLUMNS, ranking)
    assert live(columns) == ([[True] * 4], [[False, False, True, True]])


@EVERY_RULE
def test_nothing_goes_where_enough_has_gone_before(structure: Structure, ranking: Ranking) -> None:
    linears = [candidates("fc1", [0.0] * 4, [0.0] * 5, dead_rows=(1, 2), dead_columns=(0,))]
    found = allocate(linears, 0.5, structure, ranking)
    assert live(found) == ([linears[0].live_rows.tolist()], [linears[0].live_columns.tolist()])
    assert (found.n_removed, found.threshold, found.predicted_cost) == (0, 0.0, 0.0)
    assert found.sparsity == pytest.approx(12 / 20), "above the target"


@EVERY_RULE
def test_a_target_met_exactly_takes_nothing_more(structure: Structure, ranking: Ranking) -> None:
    """Also where ``(1 - target) * n_weights`` is not what it should be to the last bit."""
    n_rows, n_columns = 7, 9
    for n_gone in range(1, n_rows):
        dead_rows = tuple(range(n_gone))
        linears = [candidates("fc1", [1.0] * n_rows, [1.0] * n_columns, dead_rows=dead_rows)] * 3
        found = allocate(linears, n_gone / n_rows, structure, ranking)
        assert found.n_removed == 0
        first = allocate(linears, (n_gone * n_columns + 1) / (n_rows * n_columns), structure, ranking)
        again = [
            Candidates(c.name, c.row_costs, c.column_costs, rows, columns)
            for c, rows, columns in zip(linears, first.live_rows, first.live_columns, strict=True)
        ]
        assert first.n_removed > 0
        assert allocate(again, first.sparsity, structure, ranking).n_removed == 0


def test_the_arguments_are_left_alone() -> None:
    linears = [candidates("fc1", [1.0, 2.0], [3.0, 4.0])]
    allocate(linears, 0.9, BOTH, Ranking.COST)
    assert linears[0].live_rows.all()
    assert linears[0].live_columns.all()


@EVERY_RULE
def test_a_dead_linear_counts_as_removed_and_takes_no_part(structure: Structure, ranking: Ranking) -> None:
    dead = candidates("dead", [0.0] * 4, [0.0] * 5, dead_rows=(0, 1, 2, 3), dead_columns=(0, 1, 2, 3, 4))
    without_columns = candidates("bias only", [np.nan] * 4, [0.0] * 5, dead_columns=(0, 1, 2, 3, 4))
    alive = candidates("alive", [1.0] * 4, [1.0] * 5)
    found = allocate([dead, without_columns, alive], 0.6, structure, ranking)
    assert found.n_removed == 0
    assert found.sparsity == pytest.approx(2 / 3)
    more = allocate([dead, without_columns, alive], 0.7, structure, ranking)
    assert more.n_removed == 1
    assert more.live_rows[1].all(), "rows that only hold a bias free nothing"
    nothing = allocate([dead], 0.5, structure, ranking)
    assert (nothing.n_removed, nothing.sparsity) == (0, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_cost_that_is_not_finite_is_an_error(bad: float) -> None:
    fine = candidates("block 0, fc1", [1.0] * 3, [1.0] * 4)
    column = candidates("block 1, fc1", [1.0] * 3, [1.0, 1.0, 1.0, bad])
    with pytest.raises(NonFiniteError, match=r"^block 1, fc1: the cost of column 3 is not finite"):
        allocate([fine, column], 0.5, BOTH, Ranking.COST)
    row = candidates("block 2, fc2", [bad, 1.0, bad], [1.0] * 4, dead_rows=(0,))
    with pytest.raises(NonFiniteError, match=r"^block 2, fc2: the cost of row 2 is not finite"):
        allocate([fine, row], 0.5, BOTH, Ranking.COST_PER_WEIGHT)


@pytest.mark.parametrize("dead", ["gradient", "weight"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_dead_linear_goes_all_the_way_beside_a_living_one(biased: bool, dead: str) -> None:
    """Costs, allocation and update; the living linear alone has to meet the target."""
    generator = torch.Generator().manual_seed(0)
    n_out, n_in = 4, 6
    living = [n_out, n_in], random(generator, 30, n_in), random(generator, 30, n_out)
    weights = [torch.ones(n_out, n_in), random(generator, n_out, n_in).float()]
    gradients = [living[2], living[2]]
    if dead == "weight":
        weights[0].zero_()
    else:
        gradients[0] = torch.zeros(30, n_out, dtype=torch.float64)
    biases = [torch.zeros(n_out), torch.ones(n_out)] if biased else [None, None]
    curvatures = [
        kfac_linear(PrunedLinear.dense(weight, bias), factors_from(living[1], g), DAMPING)
        for weight, bias, g in zip(weights, biases, gradients, strict=True)
    ]
    costs = [structure_costs(curvature, Cost.OBS, WHERE) for curvature in curvatures]
    standing = [
        Candidates(WHERE, c.rows.numpy(), c.columns.numpy(), c.live_rows.numpy(), c.live_columns.numpy()) for c in costs
    ]
    found = allocate(standing, 0.7, BOTH, Ranking.COST)
    assert not found.live_rows[0].any()
    assert not found.live_columns[0].any()
    assert found.n_removed > 0
    n_left = found.live_rows[1].sum() * found.live_columns[1].sum()
    assert found.sparsity == pytest.approx(1 - n_left / (2 * n_out * n_in))
    assert 0.7 <= found.sparsity < 0.9
    results = [
        update_structures(c, torch.from_numpy(rows), torch.from_numpy(columns), UpdateSpec(UpdateRule.EXACT), WHERE)
        for c, rows, columns in zip(curvatures, found.live_rows, found.live_columns, strict=True)
    ]
    assert not results[0].linear.weight.any()
    assert results[0].predicted_cost == 0.0
    assert int(results[1].linear.weight.count_nonzero()) == n_left
    assert results[1].predicted_cost > 0
