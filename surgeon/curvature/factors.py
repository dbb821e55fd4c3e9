"""Kronecker factors of a linear, and what else a curvature is made of.

For a linear with weight `[n_out, n_in]`, input ``a_t`` and loss gradient ``g_t`` at its output for token t:

- ``A = mean_t a aᵀ`` `[n_in, n_in]`, shared by all linears that read the same input (q/k/v; gate/up);
- ``m = mean_t a`` `[n_in]`: the border of ``A`` when a bias makes the input `[a, 1]`;
- ``G = mean_t g gᵀ`` `[n_out, n_out]`, with g the gradient of the *sum* of a sequence's token losses, so that
  ``½ vec(Δ)ᵀ (G ⊗ A) vec(Δ)`` is in nats per token.

Reference: Martens & Grosse 2015, section 3; van der Ouderaa et al. 2024 (LLM Surgeon), section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EigenMoments:
    """Second moments of the gradient of a linear's weight in the eigenbasis of its K-FAC factors (EKFAC).

    Over live rows and columns, and the bias as the last column: r of ``n_out`` and c of ``n_in (+ 1)`` live.

    Attributes:
        basis_out: ``U_G`` `[r, r]` float32; columns are eigenvectors of ``G``, by rising eigenvalue.
        basis_in: ``U_A`` `[c, c]` float32, of ``A``.
        moments: ``S_ij = mean_t (u_iᵀ g)² (v_jᵀ a)²`` `[r, c]` float32.
    """

    basis_out: Tensor
    basis_in: Tensor
    moments: Tensor


@dataclass(frozen=True)
class KroneckerTerms:
    """A sum of Kronecker products ``Σ_k G_k ⊗ A_k``, the largest first, each term's norm split evenly.

    Attributes:
        gradients: ``G_k`` `[n_terms, n_out, n_out]` float32, symmetric.
        activations: ``A_k`` `[n_terms, n_in (+ 1), n_in (+ 1)]` float32, symmetric; with a bias its row is the last.
    """

    gradients: Tensor
    activations: Tensor


@dataclass(frozen=True)
class LinearFactors:
    """What is known of the curvature of one linear. A part that its kind of curvature does not need is None.

    Attributes:
        activations: ``A``, `[n_in, n_in]` float32, symmetric.
        mean_input: ``m``, `[n_in]` float32.
        gradients: ``G``, `[n_out, n_out]` float32, symmetric.
        moments: of EKFAC.
        terms: of the nearest Kronecker product or sum.
        diagonal: ``mean (g∘g)(a∘a)ᵀ`` `[n_out, n_in (+ 1)]` float32.
        loss_gradient: ``mean g aᵀ`` `[n_out, n_in (+ 1)]` float32: the gradient of the mean loss per token.
    """

    activations: Tensor | None = None
    mean_input: Tensor | None = None
    gradients: Tensor | None = None
    moments: EigenMoments | None = None
    terms: KroneckerTerms | None = None
    diagonal: Tensor | None = None
    loss_gradient: Tensor | None = None

    def augmented_activations(self) -> Tensor:
        """``A`` of the input `[a, 1]` of a linear with a bias: `[n_in + 1, n_in + 1]`, the bias last."""
        assert self.activations is not None and self.mean_input is not None, "no input factors"
        n_in = self.activations.shape[0]
        result = torch.empty(n_in + 1, n_in + 1, dtype=self.activations.dtype, device=self.activations.device)
        result[:n_in, :n_in] = self.activations
        result[n_in, :n_in] = self.mean_input
        result[:n_in, n_in] = self.mean_input
        result[n_in, n_in] = 1.0
        return result
