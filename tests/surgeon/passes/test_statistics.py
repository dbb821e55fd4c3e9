"""All statistics of block-wise passes: against the dense Fisher matrix of the stock model, and bit for bit."""

import pytest
import torch
from tiny import FAMILIES

from surgeon.choices import Targets
from surgeon.curvature.eigenbasis import LiveSets, MomentsObserver, block_eigenbases
from surgeon.curvature.kronecker_factors import InputObserver, OutputObserver
from surgeon.curvature.nearest import KroneckerObserver, nearest_terms, next_subspace, starting_subspace
from surgeon.curvature.weight_moments import DiagonalObserver, LossGradientObserver
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import GroupPass, curvature_group, observed_block
from surgeon.passes.groups import block_groups
from surgeon.passes.targets import EMPIRICAL, TokenTargets
from tests.surgeon.passes.running import LENGTH, N_SEQUENCES, kfac_observers, kfac_of, observe, sequences_of
from tests.surgeon.passes.stock import relative, stock_tokens

SAMPLED = TokenTargets(Targets.SAMPLED, draws=3, seed=11)
# Of one block: what is small enough for a dense Fisher matrix, with its bias where there is one.
SMALL = {"llama-gqa-tied": "self_attn.k_proj", "opt": "self_attn.out_proj"}


def all_live(linears):
    def ones(n):
        return torch.ones(n, dtype=torch.bool)

    return {n: LiveSets(ones(li.out_features), ones(li.in_features), li.bias is not None) for n, li in linears.items()}


def everything(model, sequences, blocks_per_group=3, batch_size=2, targets=EMPIRICAL, rank=1, iterations=2):
    """All statistics of all blocks by block, kind and linear, as tensors; several passes."""

    def run(make):
        return observe(model, sequences, make, blocks_per_group, batch_size, targets)[0]

    first = run(lambda _i, b: (*kfac_observers(b), DiagonalObserver(b), LossGradientObserver(b)))
    kfac = {index: kfac_of(each[:2]) for index, each in first.items()}
    factors = {index: {name: each.linear(name) for name in each.reads} for index, each in kfac.items()}
    result = {}
    for index, (*_, diagonal, gradient) in first.items():
        result |= {(index, "A", name): factors[index][name].activations for name in kfac[index].reads}
        result |= {(index, "G", name): factors[index][name].gradients for name in kfac[index].reads}
        result |= {(index, "diagonal", name): value for name, value in diagonal.result().items()}
        result |= {(index, "gradient", name): value for name, value in gradient.result().items()}

    def moments(index, block):
        return [MomentsObserver(block, block_eigenbases(factors[index], all_live(block.linears), block.label))]

    for index, (observer,) in run(moments).items():
        for name, each in observer.result().items():
            result |= {(index, part, name): value for part, value in vars(each).items()}
    subspaces = {
        index: {
            name: starting_subspace(factors[index][name], rank, linear.bias is not None)
            for name, linear in model.linears(index).items()
        }
        for index in factors
    }
    products = {}
    for iteration in range(iterations):
        if iteration:
            subspaces = {i: {n: next_subspace(p) for n, p in each.items()} for i, each in products.items()}
        seen = run(lambda index, block, current=subspaces: [KroneckerObserver(block, current[index])])
        products = {index: observer.result() for index, (observer,) in seen.items()}
    for index, each in products.items():
        for name, product in each.items():
            terms = nearest_terms(subspaces[index][name], product)
            result |= {(index, "terms G", name): terms.gradients, (index, "terms A", name): terms.activations}
    return result


@pytest.mark.parametrize("targets", [EMPIRICAL, SAMPLED], ids=["empirical", "sampled"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied", "falcon"])
def test_grouping_does_not_change_a_bit(family, targets, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of()
    expected = everything(model, sequences, 3, targets=targets, rank=2)
    for blocks_per_group in (1, 2):
        found = everything(model, sequences, blocks_per_group, targets=targets, rank=2)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_inputs_of_a_forward_only_pass_have_the_bits_of_a_full_one(family, dtype, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family), dtype=dtype), sequences_of()
    expected, boundaries, _ = observe(model, sequences, lambda _i, block: kfac_observers(block), 1)
    drawn, _, _ = observe(model, sequences, lambda _i, block: kfac_observers(block), 3, targets=SAMPLED)
    for blocks_per_group in (1, 3):
        for group in block_groups(3, blocks_per_group):
            alone = {index: [InputObserver(observed_block(model, index))] for index in group}
            what = GroupPass(sequences, group, 2, boundaries[group.start], needs_gradient=False)
            assert curvature_group(model, what, alone) is None
            for index in group:
                found = alone[index][0].result()
                for other in (expected, drawn):
                    full = other[index][0]
                    assert found.n_tokens == full.n_tokens == N_SEQUENCES * LENGTH
                    for name, square in found.activations.items():
                        assert torch.equal(square.tril(), (full._squares[name] / full.n_tokens).tril())
                        assert torch.equal(found.mean_inputs[name], full._sums[name] / full.n_tokens)


def test_a_forward_only_pass_has_neither_graph_nor_head(checkpoint_of, monkeypatch):
    model, sequences = BlockwiseModel(checkpoint_of("llama")), sequences_of(2)
    monkeypatch.setattr(model, "head", lambda *_: pytest.fail("the head ran"))
    graphs = []
    handle = model.linears(0)["mlp.up_proj"].register_forward_hook(lambda _m, _a, out: graphs.append(out.grad_fn))
    observers = {0: [InputObserver(observed_block(model, 0))]}
    curvature_group(model, GroupPass(sequences, range(3), 2, needs_gradient=False), observers)
    handle.remove()
    assert graphs == [None]


def test_observers_of_gradients_are_refused_by_a_forward_only_pass(checkpoint_of):
    model = BlockwiseModel(checkpoint_of("llama"))
    observers = {0: [OutputObserver(observed_block(model, 0))]}
    with pytest.raises(ValueError, match=r"needs gradients, but the pass is forward only"):
        curvature_group(model, GroupPass(sequences_of(2), range(3), 2, needs_gradient=False), observers)


def augmented(x, linear):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1) if linear.bias is not None else x


@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied", "gpt_neox", "qwen2"])
def test_diagonal_and_gradient_of_the_loss_are_those_of_the_stock_model(family, checkpoint_of):
    checkpoint, sequences = checkpoint_of(family), sequences_of()
    model = BlockwiseModel(checkpoint)
    inputs, gradients, of_weights = stock_tokens(checkpoint.path, sequences, model.architecture.blocks_path)
    seen = observe(model, sequences, lambda _i, block: (DiagonalObserver(block), LossGradientObserver(block)), 1)[0]
    n_tokens = sequences.size
    for index, observers in seen.items():
        diagonal, gradient = (observer.result() for observer in observers)
        for name, linear in model.linears(index).items():
            full = f"{model.prefix(index)}.{name}"
            weight, bias = of_weights[full]
            expected = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
            assert relative(gradient[name], expected / n_tokens) < 1e-4
            a = augmented(inputs[full], linear)
            assert relative(diagonal[name], gradients[full].square().T @ a.square() / n_tokens) < 1e-4


@pytest.mark.parametrize("family", SMALL)
def test_approximations_of_the_dense_fisher_are_in_their_order(family, checkpoint_of):
    """K-FAC is beaten by the best diagonal in its basis, by the nearest product, and that by sums of more of them."""
    checkpoint, sequences, name, index = checkpoint_of(family), sequences_of(), SMALL[family], 1
    model = BlockwiseModel(checkpoint)
    full = f"{model.prefix(index)}.{name}"
    inputs, gradients, _ = stock_tokens(checkpoint.path, sequences, model.architecture.blocks_path)
    a = augmented(inputs[full], model.linears(index)[name])
    rows = torch.einsum("to,ti->toi", gradients[full], a).flatten(1)
    fisher = rows.T @ rows / len(rows)

    def error(approximation):
        return float((approximation - fisher).norm() / fisher.norm())

    def part(found, kind):
        return found[index, kind, name].double()

    def nearest(found):
        pairs = zip(part(found, "terms G"), part(found, "terms A"), strict=True)
        return sum(torch.kron(gradient, activation) for gradient, activation in pairs)

    one = everything(model, sequences, iterations=20)
    exact_kfac = torch.kron(gradients[full].T @ gradients[full] / len(a), a.T @ a / len(a))
    basis = torch.kron(part(one, "basis_out"), part(one, "basis_in"))
    ekfac = basis @ torch.diag(part(one, "moments").flatten()) @ basis.T
    # Singular values of M = mean vec(gg') vec(aa')' from its two thin factors.
    left = torch.einsum("ti,tj->tij", gradients[full], gradients[full]).flatten(1)
    right = torch.einsum("ti,tj->tij", a, a).flatten(1)
    values = torch.linalg.svdvals(torch.linalg.qr(left.T)[1] @ torch.linalg.qr(right.T)[1].T / len(a))
    assert float(values.norm()) == pytest.approx(float(fisher.norm()), rel=1e-9)
    optimum = [float(values[k:].norm() / fisher.norm()) for k in range(4)]
    assert error(ekfac) < error(exact_kfac)
    assert error(nearest(one)) < error(exact_kfac)
    assert error(nearest(one)) == pytest.approx(optimum[1], rel=1e-4)
    errors = [error(nearest(one))]
    for rank in (2, 3):
        errors.append(error(nearest(everything(model, sequences, rank=rank, iterations=40))))
        assert errors[-1] == pytest.approx(optimum[rank], rel=1e-3)
    assert errors == sorted(errors, reverse=True)
