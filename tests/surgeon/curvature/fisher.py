"""Dense Fisher matrices of one linear in float64, and driving observers with random inputs and gradients."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from surgeon.curvature.factors import KroneckerTerms, LinearFactors
from surgeon.curvature.kronecker_factors import InputObserver, OutputObserver
from surgeon.curvature.nearest import KroneckerObserver, nearest_terms, next_subspace, starting_subspace
from surgeon.curvature.observer import LinearObserver, ObservedBlock

N_OUT, N_IN, N_SEQUENCES, LENGTH = 4, 5, 6, 10


class Data:
    """One linear, its inputs, and gradients at its output that depend on the inputs (so that K-FAC is wrong).

    Args:
        bias: whether the linear has one.
        draws: gradients for each input.
        dead: makes one row's gradient and one column's input zero.
        seed: of the numbers.
    """

    def __init__(self, bias: bool = False, draws: int = 1, dead: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(N_IN, N_OUT, bias=bias).requires_grad_(False)
        self.x = torch.randn(N_SEQUENCES, LENGTH, N_IN, generator=generator) + 0.3
        scale = self.x[..., :1].square() + 0.1
        self.g = torch.randn(draws, N_SEQUENCES, LENGTH, N_OUT, generator=generator) * scale
        self.g += self.x[..., 1:2] * torch.randn(N_OUT, generator=generator)
        if dead:
            self.x[..., 2] = 0.0
            self.g[..., 1] = 0.0
        self.block = ObservedBlock("block 7", {"fc": self.linear}, (("fc",),))

    def feed(self, *observers: LinearObserver, batch_size: int = 2) -> None:
        """Forward and backward through the linear alone, batch by batch."""
        for start in range(0, N_SEQUENCES, batch_size):
            part = slice(start, start + batch_size)
            with ExitStack() as stack:
                for observer in observers:
                    stack.enter_context(observer).start_batch(start, batch_size, LENGTH, len(self.g))
                x = self.x[part].clone().requires_grad_()
                output = self.linear(x)
                for gradient in self.g:
                    torch.autograd.grad(output, x, gradient[part], retain_graph=True)

    @property
    def inputs(self) -> Tensor:
        """`[n_tokens, n_in (+ 1)]` float64."""
        flat = self.x.reshape(-1, N_IN).double()
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1) if self.linear.bias is not None else flat

    def gradients(self) -> Tensor:
        """``vec(g aᵀ)`` of every token and draw, rows first, `[n, n_out * n_in (+ 1)]` float64."""
        a = self.inputs.repeat(len(self.g), 1)
        return torch.einsum("to,ti->toi", self.g.reshape(-1, N_OUT).double(), a).flatten(1)

    def fisher(self) -> Tensor:
        """``mean vec(g aᵀ) vec(g aᵀ)ᵀ``, dense."""
        each = self.gradients()
        return each.T @ each / len(each)

    def kfac(self) -> LinearFactors:
        """Factors of K-FAC through their observers."""
        inputs, outputs = InputObserver(self.block), OutputObserver(self.block)
        self.feed(inputs, outputs)
        found = inputs.result()
        return LinearFactors(found.activations["fc"], found.mean_inputs["fc"], outputs.result()["fc"])

    def terms(self, rank: int, iterations: int) -> KroneckerTerms:
        """The nearest Kronecker sum after some passes."""
        subspace = starting_subspace(self.kfac(), rank, self.linear.bias is not None)
        for iteration in range(iterations):
            observer = KroneckerObserver(self.block, {"fc": subspace})
            self.feed(observer)
            products = observer.result()["fc"]
            if iteration + 1 < iterations:
                subspace = next_subspace(products)
        return nearest_terms(subspace, products)


def dense_kfac(factors: LinearFactors, has_bias: bool) -> Tensor:
    activations = factors.augmented_activations() if has_bias else factors.activations
    return torch.kron(factors.gradients.double(), activations.double())


def dense_terms(terms: KroneckerTerms) -> Tensor:
    pairs = zip(terms.gradients.double(), terms.activations.double(), strict=True)
    return sum(torch.kron(gradients, activations) for gradients, activations in pairs)


def rearranged(fisher: Tensor, n_out: int) -> Tensor:
    """``M`` with ``F = Σ G ⊗ A`` as ``Σ vec(G) vec(A)ᵀ``: `[n_out², n_in²]`."""
    n_in = fisher.shape[0] // n_out
    return fisher.reshape(n_out, n_in, n_out, n_in).permute(0, 2, 1, 3).reshape(n_out**2, n_in**2)


def best_error(fisher: Tensor, n_out: int, rank: int) -> float:
    """The least Frobenius distance of any sum of that many Kronecker products."""
    return float(torch.linalg.svdvals(rearranged(fisher, n_out))[rank:].norm())
