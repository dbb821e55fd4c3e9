import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.curvature.factors import LinearFactors
from surgeon.curvature.gram import add_gram, mirror_lower

N_OUT, N_IN, N_HIDDEN = 4, 6, 5


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(x: Tensor) -> Tensor:
    """Mean outer product of the rows of ``x``, summed up as the factors are."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    add_gram(total, x)
    return mirror_lower(total.div_(len(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_tokens", [1, 3, 40])
def test_augmented_activations_are_those_of_the_input_with_a_one(n_tokens: int, dtype: torch.dtype) -> None:
    a = random(0, n_tokens, N_IN).to(dtype) + 0.5
    factors = LinearFactors(second_moment(a), a.mean(dim=0), torch.eye(N_OUT, dtype=dtype))
    with_one = torch.cat([a, torch.ones(n_tokens, 1, dtype=dtype)], dim=1)
    augmented = factors.augmented_activations()
    assert augmented.dtype is dtype
    assert_close(augmented, with_one.T @ with_one / n_tokens)
    assert torch.equal(augmented, augmented.T)


class TwoLayers:
    """``logits = V tanh(W x + b) + c`` for one input and labels as frequent as the softmax says.

    Then the mean gradient is zero, the Fisher information of each layer is the Hessian of the mean loss, and as there
    is one input only it is exactly one Kronecker product.
    """

    counts = torch.tensor([1, 2, 3, 2])

    def __init__(self) -> None:
        self.x = random(0, N_IN)
        self.w, self.b = random(1, N_HIDDEN, N_IN) / 2, random(2, N_HIDDEN)
        self.v = random(3, N_OUT, N_HIDDEN)
        self.labels = torch.repeat_interleave(torch.arange(N_OUT), self.counts)
        self.hidden = torch.tanh(self.w @ self.x + self.b)
        self.c = (self.counts / self.counts.sum()).double().log() - self.v @ self.hidden
        self.inputs = self.x.expand(len(self.labels), -1)

    def total_loss(self, before: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the token losses, and the logits, from what the first layer puts out, `[n_tokens, n_hidden]`."""
        logits = torch.tanh(before) @ v.T + c
        return torch.nn.functional.cross_entropy(logits, self.labels, reduction="sum"), logits

    def mean_loss(self, first: Tensor, second: Tensor) -> float:
        """In nats per token; ``first`` = `[W b]` and ``second`` = `[V c]`."""
        before = self.inputs @ first[:, :-1].T + first[:, -1]
        return float(self.total_loss(before, second[:, :-1], second[:, -1])[0]) / len(self.labels)

    def factors(self) -> tuple[LinearFactors, LinearFactors]:
        """Of both layers, from gradients at their outputs."""
        before = (self.inputs @ self.w.T + self.b).requires_grad_()
        total, logits = self.total_loss(before, self.v, self.c)
        by_before, by_logits = torch.autograd.grad(total, (before, logits))
        hidden = torch.tanh(before.detach())
        return (
            LinearFactors(second_moment(self.inputs), self.inputs.mean(dim=0), second_moment(by_before)),
            LinearFactors(second_moment(hidden), hidden.mean(dim=0), second_moment(by_logits)),
        )


@pytest.mark.parametrize("layer", [0, 1], ids=["first layer", "second layer"])
@pytest.mark.parametrize("seed", range(3))
def test_quadratic_model_is_the_second_difference_of_the_loss(seed: int, layer: int) -> None:
    network = TwoLayers()
    weights = [torch.cat([network.w, network.b[:, None]], dim=1), torch.cat([network.v, network.c[:, None]], dim=1)]
    delta = random(10 + seed, *weights[layer].shape)
    factors = network.factors()[layer]
    curvature = torch.kron(factors.gradients, factors.augmented_activations())
    predicted = 0.5 * float(delta.flatten() @ curvature @ delta.flatten())

    def loss(step: float) -> float:
        moved = list(weights)
        moved[layer] = weights[layer] + step * delta
        return network.mean_loss(moved[0], moved[1])

    step = 1e-4
    assert abs(loss(step) - loss(-step)) / (2 * step) < 1e-6 * predicted, "the gradient is zero here"
    rise = (loss(step) + loss(-step) - 2 * loss(0.0)) / (2 * step**2)
    assert rise == pytest.approx(predicted, rel=1e-5)
