import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.curvature import gram
from surgeon.curvature.gram import PANEL_WIDTH, add_gram, mirror_lower

PANEL_SIZES = [1, 100, PANEL_WIDTH - 1, PANEL_WIDTH, PANEL_WIDTH + 1, 2 * PANEL_WIDTH, 2 * PANEL_WIDTH + 44]
SMALL_PANEL = 4


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of four rows, so that every position of a ragged end can be tried."""
    monkeypatch.setattr(gram, "PANEL_WIDTH", SMALL_PANEL)


def tokens(n_tokens: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def above_panels(n: int, panel: int) -> Tensor:
    """`[n, n]` bool: entries to the right of the diagonal block of their panel."""
    index = torch.arange(n)
    return index[None, :] // panel > index[:, None] // panel


@pytest.mark.parametrize("n", PANEL_SIZES)
def test_lower_triangle_is_the_full_product(n: int) -> None:
    x = tokens(7, n)
    total = torch.zeros(n, n, dtype=torch.float64)
    add_gram(total, x)
    assert_close(total.tril(), (x.T @ x).tril(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("n", range(1, 3 * SMALL_PANEL + 2))
def test_ragged_panels_accumulate_and_leave_the_upper_part_alone(n: int) -> None:
    batches = [tokens(n_tokens, n, seed) for seed, n_tokens in enumerate((5, 1, 3, 0))]
    above = above_panels(n, SMALL_PANEL)
    total = torch.zeros(n, n, dtype=torch.float64)
    total[above] = 7.0
    for x in batches:
        add_gram(total, x)
    every = torch.cat(batches)
    expected = every.T @ every
    assert_close(total.tril(), expected.tril(), rtol=1e-12, atol=1e-12)
    assert (total[above] == 7.0).all(), "nothing is added there"
    total[above] = torch.nan
    assert_close(mirror_lower(total), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", PANEL_SIZES)
def test_mirrored_matrix_is_symmetric_to_the_bit_and_keeps_its_lower_triangle(n: int) -> None:
    matrix = tokens(n, n)
    lower = matrix.tril()
    matrix.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), torch.nan)
    result = mirror_lower(matrix)
    assert result is matrix, "in place"
    assert torch.equal(result, result.T)
    assert torch.equal(result.tril(), lower)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("n", range(1, 3 * SMALL_PANEL + 2))
def test_mirroring_ignores_whatever_is_above_the_diagonal(n: int) -> None:
    matrix = tokens(n, n)
    lower = matrix.tril()
    other = lower + torch.full((n, n), torch.inf, dtype=torch.float64).triu(1).nan_to_num(0.0, posinf=1e9)
    expected = lower + lower.tril(-1).T
    assert torch.equal(mirror_lower(matrix), expected)
    assert torch.equal(mirror_lower(other), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_formed_in_the_dtype_of_the_sum(dtype: torch.dtype) -> None:
    x = (tokens(50, 12) + 3).to(dtype)
    total = torch.zeros(12, 12)
    add_gram(total, x)
    exact = x.double().T @ x.double()
    assert_close(total.double().tril(), exact.tril(), rtol=1e-6, atol=0)
    assert float(((x.T @ x).double() / exact - 1).abs().max()) > 1e-4, "the product in the input's dtype is worse"
