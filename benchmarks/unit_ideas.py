"""Two ideas for units that were looked at and not built: what they could gain at most, by predicted costs.

Usage: python -m benchmarks.unit_ideas PROJECT
SmolLM2-135M on the protocol that benchmarks share, one shot to 20% with free widths.

1. *Value channels*: the value and output weights of a key/value group in the basis that K-FAC prices best (eigenvectors
   of C^½ Wᵀ G W C^½, summed over the query heads, C the mean block of A). How many channels, and how many weights, cost
   less per weight than the dearest unit that was taken?
2. *A bias in place of the mean*: the output linears get a bias that is free to adapt. By how much does it lower the
   cost of removing 30% of the units of a sub-layer?
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.protocol import open_session
from flows.curvature_shot import CurvatureShot
from flows.session import Session
from surgeon.choices import Curvature
from surgeon.curvature.factors import LinearFactors
from surgeon.models import AttentionCoupling
from surgeon.pruning.elimination import eliminate
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear
from tasks.curvature import read_statistics
from tasks.units import block_sub_layers
from tasks.weights import read_linears

SPARSITY = 0.2
REMOVED = 0.3


def channel_prices(
    linear: PrunedLinear, factors: LinearFactors, attention: AttentionCoupling, damping: float
) -> Tensor:
    """Cost per weight of every value channel of an attention in the best basis of its group, nats per token."""
    assert factors.activations is not None and factors.gradients is not None
    a, g, w = factors.activations.double(), factors.gradients.double(), linear.weight.double()
    a = a + damping * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)
    per_group = attention.n_query_heads // attention.n_kv_heads
    prices = []
    for group in range(attention.n_kv_heads):
        heads = torch.tensor(attention.columns(group)).split(attention.head_dim)
        inputs = sum((a[h][:, h] for h in heads), start=a.new_zeros(())) / per_group
        outputs = sum((w[:, h].T @ g @ w[:, h] for h in heads), start=a.new_zeros(()))
        values, vectors = torch.linalg.eigh(inputs)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        prices.append(0.5 * torch.linalg.eigvalsh(root @ outputs @ root) / ((1 + per_group) * w.shape[0]))
    return torch.cat(prices)


def bias_gain(linear: PrunedLinear, factors: LinearFactors, session: Session, owner: Tensor, n_units: int) -> float:
    """Cost of removing some units with a bias that adapts, as a part of that without."""
    costs = []
    for bias in (linear.bias, torch.zeros(linear.weight.shape[0])):
        given = replace(linear, bias=bias)
        live = live_linear(given, factors, Curvature.KFAC, session.recipe.damping, "unit_ideas")
        result = eliminate(live, owner, n_units, session.recipe.cost, "unit_ideas", 32)
        costs.append(float(result.costs[: max(1, int(REMOVED * n_units))].sum()))
    return costs[1] / costs[0]


def main() -> None:
    """Prints what both ideas could gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    given = ("prune.shots=1", f"prune.sparsity={SPARSITY}", "prune.widths=free", "run.keep=all")
    session = open_session(parser.parse_args().project, *given)
    shot = CurvatureShot(session, session.dense, session.calibration(), 1, SPARSITY)
    threshold = shot.run().record["threshold"]
    model, couplings = session.model, session.model.couplings
    assert couplings is not None
    prices, gains = [], []
    for block in range(model.n_blocks):
        statistics, linears = shot.statistics.lookup(block), read_linears(session.context, session.dense, block)
        assert statistics is not None
        subs = {sub.output: sub for sub in block_sub_layers(model, block)}
        for name, factors in read_statistics(session.context, statistics, list(subs)):
            sub = subs[name]
            gains.append(bias_gain(linears[name], factors, session, sub.owner(linears[name].live_columns), sub.n_units))
            if name == couplings[block].attention.output:
                damping = session.recipe.damping.activations
                prices.append(channel_prices(linears[name], factors, couplings[block].attention, damping))
    attention = couplings[0].attention
    each = (1 + attention.n_query_heads // attention.n_kv_heads) * model.width
    cheap, everything = int((torch.cat(prices) < threshold).sum()), torch.cat(prices).numel()
    ordered = sorted(gains)
    print(
        f"Value channels below the threshold of {threshold:.2e} nats per token and weight: {cheap} of {everything} "
        f"({cheap / everything:.1%}), {cheap * each / model.n_weights:.1%} of all weights."
    )
    print(
        f"Cost with a bias that adapts / without: median {ordered[len(ordered) // 2]:.4f}, least {ordered[0]:.3f}, "
        f"most {ordered[-1]:.3f} (of {len(ordered)} sub-layers)."
    )


if __name__ == "__main__":
    main()
