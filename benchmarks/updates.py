"""What updates of single weights cost, against their floor.

Usage: python -m benchmarks.updates [--size 4096] [--iterations 40] [--rounds 1]
       python -m benchmarks.updates PROJECT          (needs SURGEON_TEXT_DIR)

1. One linear of size x size, half of its weights gone, K-FAC, a fixed number of iterations of conjugate gradients:
   seconds of `update_weights` over those of the two bare matrix products of each iteration, alternating.
2. With PROJECT: all linears of SmolLM2-135M at 2:4 on the shared protocol (`benchmarks/protocol.py`): seconds of costs,
   mask and updates over those of the curvature pass, as the store has recorded them.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from surgeon.choices import Curvature, UpdateRule
from surgeon.curvature.factors import LinearFactors
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear
from surgeon.pruning.weight_update import update_weights
from surgeon.recipe import Damping, UpdateSpec


def single_linear(size: int, iterations: int, rounds: int) -> None:
    """Update against bare products, alternating; medians."""
    generator = torch.Generator().manual_seed(0)

    def factor() -> torch.Tensor:
        x = torch.randn(size // 2, size, generator=generator) * torch.logspace(0, -1, size)
        return x.T @ x / len(x)

    weight = torch.randn(size, size, generator=generator)
    factors = LinearFactors(factor(), torch.zeros(size), factor())
    keep = torch.rand(size, size, generator=generator) > 0.5
    spec = UpdateSpec(UpdateRule.EXACT, iterations, 1e-12)
    updates, floors = [], []
    for _ in range(rounds):
        assert factors.activations is not None and factors.gradients is not None
        start = time.perf_counter()
        x = weight
        for _ in range(iterations):
            x = factors.gradients @ weight
            x = x @ factors.activations
        floors.append(time.perf_counter() - start)
        start = time.perf_counter()
        linear = PrunedLinear.dense(weight, None)
        live = live_linear(linear, factors, Curvature.KFAC, Damping(0.01, 0.1), "one", torch.float32)
        result = update_weights(live, keep, spec, "one")
        updates.append(time.perf_counter() - start)
    assert result.convergence is not None
    update, floor = statistics.median(updates), statistics.median(floors)
    flops = 2 * iterations * 2 * size**3
    print("| | seconds | Gflop/s | of the floor |\n|---|---|---|---|")
    print(f"| {2 * iterations} bare products {size}³, float32 | {floor:.1f} | {flops / floor / 1e9:.0f} | 1.00 |")
    print(f"| update, {result.convergence.iterations} iterations | {update:.1f} | {flops / update / 1e9:.0f} "
          f"| {update / floor:.2f} |")  # fmt: skip
    print(f"\nrelative residual {result.convergence.residual:.1e}; {torch.get_num_threads()} threads")


def whole_model(project: Path, settings: list[str]) -> None:
    """2:4 of all linears against the curvature pass."""
    from benchmarks.protocol import open_session
    from flows.prune import prune

    session = open_session(project, "prune.structure=2:4", "prune.shots=1", "run.keep=all", *settings)
    (shot,) = prune(session)
    store = session.context.store.open()
    seconds: dict[str, float] = {}
    for reference in shot.references.values():
        spent = float(store.record(reference.key).get("seconds") or 0.0)
        seconds[reference.kind] = seconds.get(reference.kind, 0.0) + spent
    passes = sum(value for kind, value in seconds.items() if kind.endswith("factors"))
    pruning = sum(seconds[kind] for kind in ("costs", "mask", "update"))
    print("| | seconds | of the curvature pass |\n|---|---|---|")
    print(f"| curvature pass, 6,144 tokens | {passes:.1f} | 1.00 |")
    for kind in ("costs", "mask", "update"):
        print(f"| {kind} | {seconds[kind]:.1f} | {seconds[kind] / passes:.2f} |")
    print(f"| all of pruning at 2:4 | {pruning:.1f} | {pruning / passes:.2f} |")
    convergence = shot.record["convergence"]
    print(f"\nperplexity {shot.evaluation.attributes['perplexity']:.2f}; {convergence['iterations']} iterations in "
          f"{convergence['linears']} linears, worst residual {convergence['worst_residual']:.2f}")  # fmt: skip


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-S", dest="settings", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.project is None:
        single_linear(arguments.size, arguments.iterations, arguments.rounds)
    else:
        whole_model(arguments.project, arguments.settings)


if __name__ == "__main__":
    main()
