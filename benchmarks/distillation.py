"""Whether distillation helps: next tokens, with the dense model's next tokens, and with all five terms.

Usage: python -m benchmarks.distillation PROJECT [--tokens 8192] [--rate 3e-4]

The default model, pruned to 20% in one shot, then trained on what is left of it: each loss on as many tokens, and each
for as long as the plain one took, by the seconds per token measured before. Everything is cached below PROJECT. Prints
a table: perplexity of the evaluation windows before and after, loss of the held-out rows, seconds, and memory of
student and teacher.

Reference:
    Jha et al. 2023, *Just CHOP*, section 5.
"""

import argparse
from pathlib import Path
from typing import Any

from flows.engine import InlineEngine
from flows.params import load_params
from flows.prune import prune
from flows.recovery import recover
from flows.session import Session
from flows.workspace import Workspace
from tasks.training import TRAINING

LOSSES = {
    "next tokens": "{method: full}",
    "and logits": "{method: distill, terms: {hidden: 0, attention: 0, embedding: 0}}",
    "all five": "{method: distill}",
}
BATCH = 1024


def run(project: Path, loss: str, tokens: int, rate: float) -> dict[str, Any]:
    """Trains with one loss; facts of the stage, with seconds and peak memory of the training."""
    settings = [f"recovery={LOSSES[loss]}", f"recovery.tokens={tokens}", f"recovery.learning_rate={rate}"]
    pruning = ["prune.sparsity=0.2", "prune.shots=1", "run.engine=inline"]
    params = load_params(None, [*pruning, *settings])
    session = Session(params, Workspace(project.resolve()), InlineEngine())
    recovered = recover(session, prune(session)[-1].state)
    training = [reference for reference in recovered.references.values() if reference.kind == TRAINING.kind]
    records = [session.store.record(reference.key) for reference in training]
    return recovered.facts | {
        "seconds": sum(record["seconds"] for record in records),
        "peak_gib": max(record["peak_memory_gib"] for record in records),
    }


def row(loss: str, terms: str, facts: dict[str, Any]) -> str:
    """A line of the table."""
    memory, losses = facts["memory"], [point["loss"] for point in facts["validation"]]
    student = sum(value for name, value in memory.items() if name != "teacher_gib")
    cells = [
        loss,
        terms,
        f"{facts['tokens']:,}",
        f"{facts['before']['perplexity']:.2f}",
        f"{facts['after']['perplexity']:.2f}",
        f"{losses[0]:.3f} → {losses[-1]:.3f}",
        f"{facts['seconds']:.0f}",
        f"{student:.2f} + {memory['teacher_gib']:.2f}",
        f"{facts['peak_gib']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Trains with each loss on equal tokens, then for equal time, and prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rate", type=float, default=3e-4)
    arguments = parser.parse_args()
    head = ("loss", "equal", "tokens", "perplexity before", "after", "held-out loss", "seconds")
    head = (*head, "memory, GiB, student + teacher (estimate)", "peak, GiB")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    found = {}
    for loss in LOSSES:
        found[loss] = run(arguments.project, loss, arguments.tokens, arguments.rate)
        print(row(loss, "tokens", found[loss]), flush=True)
    budget = found["next tokens"]["seconds"]
    for loss, facts in found.items():
        affordable = budget / facts["seconds"] * facts["tokens"]
        tokens = max(BATCH, round(affordable / BATCH) * BATCH)
        print(row(loss, "time", run(arguments.project, loss, tokens, arguments.rate)), flush=True)


if __name__ == "__main__":
    main()
