"""Eigenbases of the K-FAC factors of the linears of a block, and the observer of second moments in them (EKFAC).

With ``G = U_G Λ_G U_Gᵀ`` and ``A = U_A Λ_A U_Aᵀ`` over live rows and columns (and the bias),
``F ≈ (U_G ⊗ U_A) diag(S) (U_G ⊗ U_A)ᵀ`` with ``S_ij = mean_t (u_iᵀ g)² (v_jᵀ a)²`` is the best diagonal in that basis.

Reference: George et al. 2018, *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis*, sec. 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.curvature.factors import EigenMoments, LinearFactors
from surgeon.curvature.observer import GRADIENT, INPUT, LinearObserver, ObservedBlock, augmented, tokens_of
from surgeon.errors import NumericalError


@dataclass(frozen=True)
class LiveSets:
    """What lives of one linear.

    Attributes:
        rows: `[n_out]` bool.
        columns: `[n_in]` bool.
        has_bias: whether there is a bias, which always lives.
    """

    rows: Tensor
    columns: Tensor
    has_bias: bool


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of one factor over what lives.

    Attributes:
        live: `[n]` bool, over the features, the bias not counted.
        has_bias: whether a constant input is the last coordinate.
        vectors: `[n_live (+ 1), n_live (+ 1)]` float32; columns are eigenvectors, by rising eigenvalue.
    """

    live: Tensor
    has_bias: bool
    vectors: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Coordinates of tokens in the basis: `[n_tokens, n]` → `[n_tokens, n_live (+ 1)]` float32."""
        kept = x if self.live.all() else x[:, self.live]
        return augmented(kept, self.has_bias) @ self.vectors


@dataclass(frozen=True)
class LinearBases:
    """The eigenbases of one linear. Those of a common input with the same live columns are one object."""

    outputs: Eigenbasis
    inputs: Eigenbasis


def block_eigenbases(
    factors: Mapping[str, LinearFactors], live: Mapping[str, LiveSets], label: str
) -> dict[str, LinearBases]:
    """Eigenbases of all linears of one block; what linears have in common is decomposed once.

    Args:
        factors: ``A``, mean input and ``G`` by linear; linears that read the same input hold the same tensor.
        live: live rows and columns by linear.
        label: the block, for error messages.

    Raises:
        NumericalError: if an eigendecomposition does not converge.
    """
    shared: dict[tuple[int, bool, bytes], Eigenbasis] = {}
    result = {}
    for name, sets in live.items():
        mine = factors[name]
        assert mine.activations is not None and mine.gradients is not None, "EKFAC starts from the factors of K-FAC"
        where = f"{label}, linear {name}"
        same = (mine.activations.data_ptr(), sets.has_bias, sets.columns.cpu().numpy().tobytes())
        if same not in shared:
            matrix = mine.augmented_activations() if sets.has_bias else mine.activations
            shared[same] = _eigenbasis(matrix, sets.columns, sets.has_bias, f"{where}, inputs")
        result[name] = LinearBases(_eigenbasis(mine.gradients, sets.rows, False, f"{where}, outputs"), shared[same])
    return result


def _eigenbasis(matrix: Tensor, live: Tensor, has_bias: bool, where: str) -> Eigenbasis:
    kept = torch.cat([live, live.new_ones(1)]) if has_bias else live
    try:
        _, vectors = torch.linalg.eigh(matrix[kept][:, kept].double())
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"{where}: the eigenvalues of the {len(live)}x{len(live)} factor do not converge ({error}). "
            "Use more calibration sequences, or curvature kfac."
        ) from error
    return Eigenbasis(live, has_bias, vectors.float())


class MomentsObserver(LinearObserver):
    """Accumulates ``S`` for the linears of one block.

    Args:
        block: what is observed.
        bases: of every linear.
    """

    def __init__(self, block: ObservedBlock, bases: Mapping[str, LinearBases]) -> None:
        super().__init__(block)
        self._bases = bases
        self._moments = {
            name: self._zeros(each.outputs.vectors.shape[0], each.inputs.vectors.shape[0])
            for name, each in bases.items()
        }
        self._rotated: dict[int, tuple[Tensor, Tensor]] = {}

    def _on_input(self, name: str, x: Tensor) -> Tensor:
        """``(v_jᵀ a)²`` `[n_tokens, c]`, computed once for all linears with this input and this basis."""
        basis = self._bases[name].inputs
        seen, squares = self._rotated.get(id(basis), (None, None))
        if squares is None or seen is None or seen.data_ptr() != x.data_ptr():
            squares = basis.rotate(tokens_of(x)).square_()
            self._require_finite(squares.sum() + x.sum(dtype=torch.float32), x, name, INPUT)
            # The input is held too: as long as it is, no other tensor can be where it is.
            self._rotated[id(basis)] = (x, squares)
        return squares

    def start_batch(self, first_sequence: int, n_sequences: int, length: int, n_draws: int = 1) -> None:
        """Announces a batch, as for every observer, and forgets the inputs of the one before."""
        super().start_batch(first_sequence, n_sequences, length, n_draws)
        self._rotated.clear()

    def _on_gradient(self, name: str, kept: Tensor, gradient: Tensor) -> None:
        rotated = self._bases[name].outputs.rotate(tokens_of(gradient))
        self._moments[name].addmm_(rotated.square_().T, kept)
        self._require_finite(self._moments[name].sum() + gradient.sum(dtype=torch.float32), gradient, name, GRADIENT)

    def result(self) -> dict[str, EigenMoments]:
        """Bases and mean moments by linear; the observer's sums are used up by this call."""
        return {
            name: EigenMoments(each.outputs.vectors, each.inputs.vectors, self._moments[name].div_(self.n_gradients))
            for name, each in self._bases.items()
        }
