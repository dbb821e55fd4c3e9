"""The nearest Kronecker product or sum of products, by subspace iteration on the rearranged Fisher matrix.

``M = mean_t vec(g gᵀ) vec(a aᵀ)ᵀ`` `[n_out², n_in²]` has the entries of ``F = mean_t (g gᵀ) ⊗ (a aᵀ)`` in another
order, in which a Kronecker product ``G ⊗ A`` is the rank-one matrix ``vec(G) vec(A)ᵀ``: the nearest sum of k products
in the Frobenius norm is the truncated singular value decomposition of ``M``. ``M`` is never formed. For k symmetric
matrices ``Q_A`` and ``Q_G`` a pass over the tokens gives

    M Q_A = mean_t (aᵀ Q_A a) g gᵀ        Mᵀ Q_G = mean_t (gᵀ Q_G g) a aᵀ,

for all k at once, and orthonormalising these gives the next ``Q_G`` and ``Q_A``. The matrices a pass starts from and
those it gives are one half step apart, so the last pass is used twice: its ``M Q_A`` is the best left side for its
``Q_A`` and its ``Mᵀ Q_G`` the best right side for its ``Q_G``; the one that explains more of ``F`` is taken. Even one
pass from the factors of K-FAC so is no worse than K-FAC. Started from a positive semi-definite matrix, the first of
the sequence stays so: it is a sum of outer products with weights that are not negative.

Reference: Van Loan & Pitsianis 1993, *Approximation with Kronecker Products*; van der Ouderaa et al. 2024 (LLM
Surgeon), section 3.1 and appendix; Golub & Van Loan, section 8.2.4 (orthogonal iteration).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.curvature.factors import KroneckerTerms, LinearFactors
from surgeon.curvature.gram import add_weighted_gram, mirror_lower
from surgeon.curvature.observer import GRADIENT, INPUT, LinearObserver, ObservedBlock, augmented, tokens_of

_START_SEED = 7
"""Seed of the matrices that, beside those of K-FAC, a sum of several terms starts from."""
_DEPENDENT = 1e-12
"""What is left of a matrix, relative to it, below which it counts as a combination of those before it."""


@dataclass(frozen=True)
class Subspace:
    """Orthonormal symmetric matrices (in the Frobenius inner product); a zero stands for one that is not needed.

    Attributes:
        outputs: ``Q_G`` `[k, n_out, n_out]` float32.
        inputs: ``Q_A`` `[k, n_in (+ 1), n_in (+ 1)]` float32.
    """

    outputs: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class Products:
    """What one pass gives.

    Attributes:
        outputs: ``M Q_A`` `[k, n_out, n_out]` float32, symmetric.
        inputs: ``Mᵀ Q_G`` `[k, n_in (+ 1), n_in (+ 1)]` float32, symmetric.
    """

    outputs: Tensor
    inputs: Tensor


def starting_subspace(factors: LinearFactors, rank: int, has_bias: bool) -> Subspace:
    """Where the iteration begins: the factors of K-FAC, and random matrices if there are to be several terms.

    Args:
        factors: ``A``, the mean input and ``G`` of one linear.
        rank: number of terms.
        has_bias: whether the input is `[a, 1]`.
    """
    assert factors.activations is not None and factors.gradients is not None, "starts from the factors of K-FAC"
    inputs = factors.augmented_activations() if has_bias else factors.activations
    return Subspace(_orthonormal(_started(factors.gradients, rank))[0], _orthonormal(_started(inputs, rank))[0])


def next_subspace(products: Products) -> Subspace:
    """The subspace for the next pass."""
    return Subspace(_orthonormal(products.outputs)[0], _orthonormal(products.inputs)[0])


def nearest_terms(subspace: Subspace, products: Products) -> KroneckerTerms:
    """The terms after the last pass: singular values and vectors of ``M`` within its subspace.

    Args:
        subspace: the one the pass was made with.
        products: what it gave.
    """
    outputs, core = _orthonormal(products.outputs)
    inputs, core_of_inputs = _orthonormal(products.inputs)
    # What is left of F is what is not in the core, so the larger core is the better approximation.
    if core_of_inputs.norm() > core.norm():
        outputs, core = subspace.outputs, core_of_inputs.T
    else:
        inputs = subspace.inputs
    left, values, right = torch.linalg.svd(core)
    scale = values.sqrt()
    gradients = torch.einsum("ik,iab->kab", left * scale, outputs.double())
    activations = torch.einsum("kj,jab->kab", scale[:, None] * right, inputs.double())
    signs = torch.where(activations.diagonal(dim1=1, dim2=2).sum(dim=1) < 0, -1.0, 1.0)[:, None, None]
    return KroneckerTerms((signs * gradients).float(), (signs * activations).float())


def _started(first: Tensor, rank: int) -> Tensor:
    """A matrix and random symmetric ones after it, `[rank, n, n]` float64: the same for the same rank and size."""
    generator = torch.Generator().manual_seed(_START_SEED)
    n = first.shape[0]
    noise = torch.randn(rank - 1, n, n, generator=generator, dtype=torch.float64).to(first.device)
    return torch.cat([first.double()[None], noise + noise.transpose(1, 2)])


def _orthonormal(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """QR decomposition of symmetric matrices as vectors: ``Y_j = Σ_i Q_i R_ij``, by Gram-Schmidt done twice.

    Householder's method would complete dependent matrices by such that are not symmetric; here they become zero.

    Args:
        matrices: ``Y`` `[k, n, n]`.

    Returns:
        ``Q`` `[k, n, n]` float32 and ``R`` `[k, k]` float64, upper triangular.
    """
    q = matrices.to(torch.float64, copy=True)
    k = len(q)
    r = torch.zeros(k, k, dtype=torch.float64, device=q.device)
    for j in range(k):
        before = q[j].norm()
        for _ in range(2):
            for i in range(j):
                overlap = (q[i] * q[j]).sum()
                r[i, j] += overlap
                q[j] -= overlap * q[i]
        length = q[j].norm()
        if length > _DEPENDENT * before:
            r[j, j] = length
            q[j] /= length
        else:
            q[j] = 0.0
    return q.float(), r


class KroneckerObserver(LinearObserver):
    """Accumulates ``M Q_A`` and ``Mᵀ Q_G`` for the linears of one block.

    Args:
        block: what is observed.
        subspaces: of every linear.
    """

    def __init__(self, block: ObservedBlock, subspaces: Mapping[str, Subspace]) -> None:
        super().__init__(block)
        self._subspaces = subspaces
        self._outputs = {name: torch.zeros_like(each.outputs) for name, each in subspaces.items()}
        self._inputs = {name: torch.zeros_like(each.inputs) for name, each in subspaces.items()}

    def _on_input(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input, and ``aᵀ Q_A a`` by term and token, `[k, n_tokens]`."""
        flat = augmented(tokens_of(x), self.block.linears[name].bias is not None)
        weights = _quadratic_forms(self._subspaces[name].inputs, flat)
        self._require_finite(weights.sum() + x.sum(dtype=torch.float32), x, name, INPUT)
        return x, weights

    def _on_gradient(self, name: str, kept: tuple[Tensor, Tensor], gradient: Tensor) -> None:
        x, weights_of_outputs = kept
        a = augmented(tokens_of(x), self.block.linears[name].bias is not None)
        g = tokens_of(gradient)
        weights_of_inputs = _quadratic_forms(self._subspaces[name].outputs, g)
        for total, weights in zip(self._outputs[name], weights_of_outputs, strict=True):
            add_weighted_gram(total, g, weights)
        for total, weights in zip(self._inputs[name], weights_of_inputs, strict=True):
            add_weighted_gram(total, a, weights)
        witness = [part.diagonal(dim1=1, dim2=2).sum() for part in (self._outputs[name], self._inputs[name])]
        self._require_finite(sum(witness, start=gradient.sum(dtype=torch.float32)), gradient, name, GRADIENT)

    def result(self) -> dict[str, Products]:
        """The means by linear; the observer's sums are used up by this call."""
        for total in (*self._outputs.values(), *self._inputs.values()):
            for matrix in total.div_(self.n_gradients):
                mirror_lower(matrix)
        return {name: Products(self._outputs[name], self._inputs[name]) for name in self._outputs}


def _quadratic_forms(matrices: Tensor, x: Tensor) -> Tensor:
    """``xᵀ Q_k x`` for every token, `[k, n_tokens]`."""
    return torch.stack([((x @ matrix) * x).sum(dim=1) for matrix in matrices])
