"""Which ranking, update, damping and number of shots prune best: SmolLM2-135M, rows and columns, 10, 20 and 30%.

Usage: python -m benchmarks.ablation PROJECT [--seeds 0 1] [--shots 1 3] [--damping 0.01/0.1 ...]
Damping is that of activations / gradients. Everything is cached below PROJECT, so that an interrupted run goes on, and
several may run at once. Prints a table; perplexities of one row are those of the shots of one run where shots > 1.
"""

import argparse
import itertools
from pathlib import Path

from benchmarks.protocol import open_session
from flows.prune import prune
from flows.session import Session

TARGETS = (0.1, 0.2, 0.3)


def perplexities(project: Path, settings: list[str], shots: int) -> list[float]:
    """Perplexity at each target: after one shot each, or after the shots of one run to the last target."""
    if shots == 1:
        runs = [(f"prune.sparsity={target}", "prune.shots=1") for target in TARGETS]
    else:
        runs = [(f"prune.sparsity={TARGETS[-1]}", f"prune.shots={shots}")]
    results = []
    for run in runs:
        session = open_session(project, "run.keep=all", *settings, *run)
        done = prune(session)
        every = len(done) // len(TARGETS) if shots > 1 else 1
        results += [shot.evaluation.attributes["perplexity"] for shot in done[every - 1 :: every]]
    return results


def dense_perplexity(session: Session) -> float:
    """Perplexity of the model before pruning."""
    from flows.stages import evaluate_other

    return float(evaluate_other(session)["perplexity"])


def main() -> None:
    """Runs the grid and prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--damping", nargs="+", default=["0.01/0.01", "0.1/0.1", "0.01/0.1"])
    arguments = parser.parse_args()
    dense = dense_perplexity(open_session(arguments.project))
    print(f"Perplexity; dense {dense:.2f}.\n")
    print(
        "| seed | shots | damping | ranking | update | 10% | 20% | 30% |\n|---|---|---|---|---|---|---|---|", flush=True
    )
    grid = itertools.product(
        arguments.seeds, arguments.shots, arguments.damping, ("cost", "cost-per-weight"), ("exact", "independent")
    )
    for seed, shots, damping, ranking, update in grid:
        activations, gradients = damping.split("/")
        settings = [f"seed={seed}", f"prune.damping={{activations: {activations}, gradients: {gradients}}}"]
        settings += [f"prune.ranking={ranking}", f"prune.update={update}"]
        values = " | ".join(f"{value:.2f}" for value in perplexities(arguments.project, settings, shots))
        print(f"| {seed} | {shots} | {damping} | {ranking} | {update} | {values} |", flush=True)


if __name__ == "__main__":
    main()
