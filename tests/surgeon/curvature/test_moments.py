"""EKFAC's moments, the diagonal and the gradient of the loss against dense matrices in float64."""

import pytest
import torch
from torch import nn

from surgeon.curvature.eigenbasis import LiveSets, MomentsObserver, block_eigenbases
from surgeon.curvature.factors import LinearFactors
from surgeon.curvature.observer import ObservedBlock
from surgeon.curvature.weight_moments import DiagonalObserver, LossGradientObserver
from surgeon.errors import NonFiniteError
from tests.surgeon.curvature.fisher import N_IN, N_OUT, Data, dense_kfac
from tests.surgeon.curvature.test_nearest import CASES


def live_of(data, dead):
    rows, columns = torch.ones(N_OUT, dtype=torch.bool), torch.ones(N_IN, dtype=torch.bool)
    if dead:
        rows[1] = columns[2] = False
    return LiveSets(rows, columns, data.linear.bias is not None)


def moments_of(data, dead=False):
    live = live_of(data, dead)
    observer = MomentsObserver(data.block, block_eigenbases({"fc": data.kfac()}, {"fc": live}, "block 7"))
    data.feed(observer)
    return observer.result()["fc"], live


def dense_ekfac(moments):
    basis = torch.kron(moments.basis_out.double(), moments.basis_in.double())
    return basis @ torch.diag(moments.moments.double().flatten()) @ basis.T


def live_weights(live):
    """`[n_out * n_in (+ 1)]` bool, rows first."""
    columns = torch.cat([live.columns, torch.ones(1, dtype=torch.bool)]) if live.has_bias else live.columns
    return (live.rows[:, None] & columns).flatten()


@pytest.mark.parametrize("options", CASES)
def test_moments_are_the_diagonal_in_their_basis_and_nearer_than_kfac(options):
    data = Data(**options)
    moments, live = moments_of(data, options.get("dead", False))
    kept = live_weights(live)
    fisher = data.fisher()[kept][:, kept]
    basis = torch.kron(moments.basis_out.double(), moments.basis_in.double())
    exact = (basis.T @ fisher @ basis).diagonal().reshape(moments.moments.shape)
    torch.testing.assert_close(moments.moments.double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-5)
    kfac = dense_kfac(data.kfac(), live.has_bias)[kept][:, kept]
    in_basis = basis.T @ kfac @ basis
    assert float((in_basis - torch.diag(in_basis.diagonal())).norm()) < 1e-5 * float(kfac.norm()), "an eigenbasis"
    assert float((dense_ekfac(moments) - fisher).norm()) < 0.99 * float((kfac - fisher).norm())


def test_nothing_dead_is_in_the_basis():
    data = Data(bias=True, dead=True)
    moments, _ = moments_of(data, dead=True)
    assert moments.moments.shape == (N_OUT - 1, N_IN)
    assert float(moments.moments.min()) > 0


def test_no_row_alive():
    data = Data()
    live = LiveSets(torch.zeros(N_OUT, dtype=torch.bool), torch.zeros(N_IN, dtype=torch.bool), False)
    observer = MomentsObserver(data.block, block_eigenbases({"fc": data.kfac()}, {"fc": live}, "block 7"))
    data.feed(observer)
    assert observer.result()["fc"].moments.shape == (0, 0)


def test_linears_with_one_input_share_basis_and_rotation(monkeypatch):
    q, k, v = (nn.Linear(N_IN, N_OUT, bias=bias).requires_grad_(False) for bias in (False, False, True))
    block = ObservedBlock("block 0", {"q": q, "k": k, "v": v}, (("q", "k", "v"),))
    activations, mean = torch.eye(N_IN) + 0.2, torch.zeros(N_IN)
    factors = {name: LinearFactors(activations, mean, torch.eye(N_OUT)) for name in "qkv"}
    rows, columns = torch.ones(N_OUT, dtype=torch.bool), torch.ones(N_IN, dtype=torch.bool)
    live = {name: LiveSets(rows, columns.clone(), name == "v") for name in "qkv"}
    bases = block_eigenbases(factors, live, "block 0")
    assert bases["q"].inputs is bases["k"].inputs
    assert bases["v"].inputs is not bases["q"].inputs
    fewer = {**live, "k": LiveSets(rows, columns & (torch.arange(N_IN) > 0), False)}
    assert len({id(each.inputs) for each in block_eigenbases(factors, fewer, "block 0").values()}) == 3
    n_rotations = []
    rotate = type(bases["q"].inputs).rotate
    monkeypatch.setattr(type(bases["q"].inputs), "rotate", lambda self, x: n_rotations.append(1) or rotate(self, x))
    data = Data()
    with MomentsObserver(block, bases) as observer:
        for start in (0, 2):
            n_rotations.clear()
            observer.start_batch(start, 2, data.x.shape[1])
            x = data.x[start : start + 2].clone().requires_grad_()
            outputs = [linear(x) for linear in (q, k, v)]
            assert len(n_rotations) == 2
            torch.autograd.grad(outputs, x, [data.g[0, start : start + 2]] * 3)
    found = observer.result()
    assert torch.equal(found["q"].moments, found["k"].moments)
    assert found["v"].moments.shape == (N_OUT, N_IN + 1)


@pytest.mark.parametrize("options", CASES)
def test_diagonal_and_gradient_are_exact(options):
    data = Data(**options)
    diagonal, gradient = DiagonalObserver(data.block), LossGradientObserver(data.block)
    data.feed(diagonal, gradient)
    shape = (N_OUT, N_IN + options.get("bias", False))
    exact = data.fisher().diagonal().reshape(shape)
    torch.testing.assert_close(diagonal.result()["fc"].double(), exact, rtol=1e-5, atol=1e-7)
    exact = data.gradients().mean(dim=0).reshape(shape)
    torch.testing.assert_close(gradient.result()["fc"].double(), exact, rtol=1e-4, atol=1e-6)


def observers_of(data):
    bases = block_eigenbases({"fc": data.kfac()}, {"fc": live_of(data, False)}, "block 7")
    return [DiagonalObserver(data.block), LossGradientObserver(data.block), MomentsObserver(data.block, bases)]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_named(which, value):
    data = Data(bias=True)
    observer = observers_of(data)[which]
    good = data.x[3, 4, 2].clone()
    data.x[3, 4, 2] = value
    with pytest.raises(NonFiniteError, match=r"input activation in block 7, linear fc, sequence 3\. "):
        data.feed(observer)
    data.x[3, 4, 2] = good
    observer = observers_of(data)[which]
    data.g[0, 4, 0, 1] = value
    with pytest.raises(NonFiniteError, match=r"output gradient in block 7, linear fc, sequence 4\. "):
        data.feed(observer)
