"""Small random pruning problems and their dense exact answers in float64.

``W`` is `[n_out, n_in]`, or `[n_out, n_in + 1]` with the bias last; ``vec`` reads it row by row, so that
``tr(G Δ A Δᵀ) = vec(Δ)ᵀ (G ⊗ A) vec(Δ)`` with ``G ⊗ A = torch.kron(G, A)``. ``a`` and ``g`` here are restricted to
live structures. The answers use nothing of the code under test beyond its containers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from surgeon.choices import Curvature
from surgeon.curvature.factors import LinearFactors
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import LiveLinear, live_linear
from surgeon.recipe import Damping

N_OUT, N_IN = 8, 9
ENOUGH_TOKENS, FEW_TOKENS = 64, 3
REMOVED_ROWS, REMOVED_COLUMNS = (1, 6), (0, 5)
ZERO_ROW, ROW_WITHOUT_GRADIENT = 2, 4
ZERO_COLUMN, COLUMN_WITHOUT_INPUT = 3, 7
DAMPING = Damping(activations=0.01, gradients=0.03)
WHERE = "block 0, fc1"


@dataclass(frozen=True)
class Case:
    """One combination of what a linear can be like."""

    bias: bool
    removed: bool
    few_tokens: bool
    dead: bool

    def __str__(self) -> str:
        return "-".join(
            (
                "bias" if self.bias else "nobias",
                "removed" if self.removed else "fresh",
                "few" if self.few_tokens else "enough",
                "dead" if self.dead else "alive",
            )
        )


CASES = [pytest.param(Case(*flags), id=str(Case(*flags))) for flags in product((False, True), repeat=4)]


@dataclass(frozen=True)
class Problem:
    """A linear with the data its curvature comes from.

    Attributes:
        linear: float32 weights; earlier removed structures are zero and not live.
        factors: float64, from ``inputs`` and ``gradients``.
        inputs: `[n_tokens, n_in]` float64.
        gradients: `[n_tokens, n_out]` float64.
        rows: rows that live once dead ones are taken out; columns likewise.
        n_dead_rows: rows that are dead but not yet removed; n_dead_columns likewise.
    """

    linear: PrunedLinear
    factors: LinearFactors
    inputs: Tensor
    gradients: Tensor
    rows: list[int]
    columns: list[int]
    n_dead_rows: int = 0
    n_dead_columns: int = 0

    @property
    def has_bias(self) -> bool:
        return self.linear.bias is not None

    @property
    def w(self) -> Tensor:
        """``[W b]`` over live structures."""
        weight = self.linear.weight.double()[self.rows][:, self.columns]
        if self.linear.bias is None:
            return weight
        return torch.cat([weight, self.linear.bias.double()[self.rows, None]], dim=1)

    @property
    def a(self) -> Tensor:
        """Gram matrix of the live inputs, with a constant one where there is a bias."""
        x = self.inputs[:, self.columns]
        if self.has_bias:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        return x.T @ x / len(x)

    @property
    def g(self) -> Tensor:
        x = self.gradients[:, self.rows]
        return x.T @ x / len(x)

    @property
    def a_damped(self) -> Tensor:
        return damped(self.a, DAMPING.activations)

    @property
    def g_damped(self) -> Tensor:
        return damped(self.g, DAMPING.gradients)

    def masks(self, gone_rows: Sequence[int], gone_columns: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Live rows and columns `[n_out]`, `[n_in]` bool once some live ones (counted among the live) have gone."""
        live_rows, live_columns = torch.zeros(N_OUT, dtype=torch.bool), torch.zeros(N_IN, dtype=torch.bool)
        live_rows[[r for i, r in enumerate(self.rows) if i not in gone_rows]] = True
        live_columns[[c for i, c in enumerate(self.columns) if i not in gone_columns]] = True
        return live_rows, live_columns

    def place(self, live: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the full shape from ``[W b]`` over live structures."""
        weight = torch.zeros(N_OUT, N_IN, dtype=torch.float64)
        weight[torch.tensor(self.rows)[:, None], torch.tensor(self.columns)[None]] = live[:, : len(self.columns)]
        if not self.has_bias:
            return weight, None
        bias = torch.zeros(N_OUT, dtype=torch.float64)
        bias[self.rows] = live[:, -1]
        return weight, bias


@dataclass(frozen=True)
class KfacLinear(LiveLinear):
    """A live linear whose curvature is known to be one Kronecker product."""

    curvature: KroneckerCurvature


def kfac_linear(linear: PrunedLinear, factors: LinearFactors, damping: Damping = DAMPING) -> KfacLinear:
    """The live part with its K-FAC curvature, both factors factorised."""
    live = live_linear(linear, factors, Curvature.KFAC, damping, WHERE)
    assert isinstance(live.curvature, KroneckerCurvature)
    _ = live.curvature.activations, live.curvature.gradients
    return KfacLinear(**vars(live))


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_problem(case: Case, seed: int = 0) -> Problem:
    """A random linear whose inputs are correlated, of different sizes and not centred."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = FEW_TOKENS if case.few_tokens else ENOUGH_TOKENS
    inputs = random(generator, n_tokens, N_IN) @ random(generator, N_IN, N_IN) / 3 + 0.5 * random(generator, N_IN)
    gradients = random(generator, n_tokens, N_OUT) @ random(generator, N_OUT, N_OUT)
    weight = random(generator, N_OUT, N_IN).float()
    bias = random(generator, N_OUT).float() if case.bias else None
    dead_rows, dead_columns = set(), set()
    if case.dead:
        weight[ZERO_ROW] = 0
        weight[:, ZERO_COLUMN] = 0
        if bias is not None:
            bias[ZERO_ROW] = 0
        gradients[:, ROW_WITHOUT_GRADIENT] = 0
        inputs[:, COLUMN_WITHOUT_INPUT] = 0
        dead_rows, dead_columns = {ZERO_ROW, ROW_WITHOUT_GRADIENT}, {ZERO_COLUMN, COLUMN_WITHOUT_INPUT}
    linear = PrunedLinear.dense(weight, bias)
    removed_rows, removed_columns = set(), set()
    if case.removed:
        removed_rows, removed_columns = set(REMOVED_ROWS), set(REMOVED_COLUMNS)
        live_rows = torch.tensor([r not in removed_rows for r in range(N_OUT)])
        live_columns = torch.tensor([c not in removed_columns for c in range(N_IN)])
        linear = PrunedLinear(
            weight * live_rows[:, None] * live_columns,
            None if bias is None else bias * live_rows,
            live_rows,
            live_columns,
        )
    return Problem(
        linear=linear,
        factors=factors_from(inputs, gradients),
        inputs=inputs,
        gradients=gradients,
        rows=[r for r in range(N_OUT) if r not in dead_rows | removed_rows],
        columns=[c for c in range(N_IN) if c not in dead_columns | removed_columns],
        n_dead_rows=len(dead_rows),
        n_dead_columns=len(dead_columns),
    )


def factors_from(inputs: Tensor, gradients: Tensor) -> LinearFactors:
    """Means over tokens of outer products; inputs `[n_tokens, n_in]`, gradients `[n_tokens, n_out]`."""
    n_tokens = len(inputs)
    return LinearFactors(inputs.T @ inputs / n_tokens, inputs.mean(dim=0), gradients.T @ gradients / n_tokens)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """A multiple of the mean of the diagonal added to the diagonal."""
    n = len(matrix)
    return matrix + damping * sum(float(matrix[i, i]) for i in range(n)) / n * torch.eye(n, dtype=matrix.dtype)


def objective(f: Tensor, delta: Tensor) -> float:
    """``½ vec(Δ)ᵀ F vec(Δ)``."""
    return 0.5 * float(delta.flatten() @ f @ delta.flatten())


def best_change(f: Tensor, w: Tensor, gone: Tensor) -> tuple[Tensor, float]:
    """Minimises ``½ vec(Δ)ᵀ F vec(Δ)`` subject to ``Δ = -W`` where ``gone``, by its whole KKT system.

    Args:
        f: `[n_out n_in, n_out n_in]`, positive semi-definite.
        w: `[n_out, n_in]`.
        gone: `[n_out, n_in]` bool.

    Returns:
        Δ `[n_out, n_in]` (of least norm if there are several) and the objective.
    """
    n = w.numel()
    constraints = torch.eye(n, dtype=f.dtype)[gone.flatten()]
    n_constraints = len(constraints)
    system = torch.zeros(n + n_constraints, n + n_constraints, dtype=f.dtype)
    system[:n, :n] = f
    system[n:, :n] = constraints
    system[:n, n:] = constraints.T
    right = torch.cat([torch.zeros(n, dtype=f.dtype), -w.flatten()[gone.flatten()]])
    solution = torch.linalg.lstsq(system, right[:, None], rcond=1e-13, driver="gelsd").solution
    delta = solution[:n, 0].reshape(w.shape)
    return delta, objective(f, delta)


def gone_mask(w: Tensor, gone_rows: Sequence[int], gone_columns: Sequence[int]) -> Tensor:
    """Entries of ``w`` in some rows or columns, `[n_out, n_in]` bool."""
    gone = torch.zeros(w.shape, dtype=torch.bool)
    gone[list(gone_rows)] = True
    gone[:, list(gone_columns)] = True
    return gone
