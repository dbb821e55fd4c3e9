"""Work of passes through the model: forward, backward, and the sums that observers form on the way.

For each token a linear takes ``n_out n_in`` multiply-adds forward and as many backward, since only gradients of
activations are taken. Attention multiplies queries with keys and weights with values: ``2 q L`` a token with the width
q of all query heads and L tokens a sequence (masked pairs count, as kernels mostly compute them), and twice that
backward. Norms, activation functions and rotations are in the measured rates, not in the counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from surgeon.curvature.gram import PANEL_WIDTH
from surgeon.planning.work import Work


@dataclass(frozen=True)
class BlockShape:
    """What a token costs in one decoder block.

    Attributes:
        n_weights: of all its linears.
        query_width: features of all query heads together.
    """

    n_weights: int
    query_width: int

    def forward(self, n_tokens: float, length: float) -> float:
        """Multiply-adds of a forward pass over tokens in sequences of some length."""
        return n_tokens * (self.n_weights + 2 * self.query_width * length)

    def backward(self, n_tokens: float, length: float) -> float:
        """Multiply-adds of a backward pass to activations."""
        return n_tokens * (self.n_weights + 4 * self.query_width * length)


def forward_work(blocks: Iterable[BlockShape], n_tokens: float, length: float) -> Work:
    """A forward pass through some blocks."""
    return Work.of(forward=sum(block.forward(n_tokens, length) for block in blocks))


def backward_work(blocks: Iterable[BlockShape], n_tokens: float, length: float) -> Work:
    """A backward pass through some blocks, to activations."""
    return Work.of(backward=sum(block.backward(n_tokens, length) for block in blocks))


def head_work(n_head: int, n_tokens: float) -> Work:
    """Head and loss, forward; `n_head` weights of the head."""
    return Work.of(head=n_head * n_tokens)


def head_backward_work(n_head: int, n_tokens: float) -> Work:
    """Head and loss, backward to the hidden states."""
    return Work.of(head_backward=n_head * n_tokens)


def gram_work(sizes: Iterable[int], n_tokens: float) -> Work:
    """Triangular sums of outer products of vectors of these sizes, by panels (`surgeon/curvature/gram.py`)."""
    total = 0
    for n in sizes:
        for start in range(0, n, PANEL_WIDTH):
            stop = min(start + PANEL_WIDTH, n)
            total += (stop - start) * stop
    return Work.of(gram=total * n_tokens)


def step_work(weight_bytes: float, n_weights: float, batch_size: int) -> Work:
    """One token for each of some sequences: bounded by reading the weights, then by what further tokens compute."""
    return Work.of(step=weight_bytes, step_tokens=(batch_size - 1) * n_weights)
