"""Which ranking, update, damping and number of shots prune best: SmolLM2-135M, rows and columns, 10, 20 and 30%.

Usage: python -m benchmarks.ablation PROJECT [--seeds 0 1]
Everything is cached below PROJECT, so that an interrupted run goes on. Writes PROJECT/ablation.md.
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
    """Runs the grid and writes the table after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3])
    arguments = parser.parse_args()
    dense = dense_perplexity(open_session(arguments.project))
    lines = [
        f"Perplexity, dense {dense:.2f}. Command: `python -m benchmarks.ablation PROJECT`.",
        "",
        "| seed | shots | damping | ranking | update | 10% | 20% | 30% |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    grid = itertools.product(
        arguments.seeds, arguments.shots, (0.01, 0.1), ("cost", "cost-per-weight"), ("exact", "independent")
    )
    for seed, shots, damping, ranking, update in grid:
        settings = [f"seed={seed}", f"prune.damping={damping}", f"prune.ranking={ranking}", f"prune.update={update}"]
        values = " | ".join(f"{value:.2f}" for value in perplexities(arguments.project, settings, shots))
        lines.append(f"| {seed} | {shots} | {damping} | {ranking} | {update} | {values} |")
        print(lines[-1], flush=True)
        (arguments.project / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
