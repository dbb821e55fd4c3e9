"""What an exported model weighs, how fast it is and what it costs: the table of docs/deployment.md.

Usage: python -m benchmarks.deployment PROJECT [--sparsities 0.1 0.2 0.3] [--rounds 3] [--batch-sizes 1 8 32]
    [--new-tokens 16]
SmolLM2-135M on the protocol that benchmarks share. Units with equal and with free widths, and the rows and columns of
the paper, are pruned in one shot, exported, loaded back, and measured beside the dense model. What is pruned is cached
below PROJECT; speed is measured anew.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.protocol import open_session
from flows.session import Session
from flows.stages import run_stage
from flows.workspace import read_json

STRUCTURES = {
    "units, equal widths": ["prune.structure=units", "prune.widths=uniform"],
    "units, free widths": ["prune.structure=units", "prune.widths=free"],
    "rows and columns": ["prune.structure=rows-and-columns"],
}
STAGES = ("model", "calibrate", "evaluate", "prune", "export", "benchmark")
_MIB = 2**20


def facts_of(session: Session) -> dict[str, dict[str, Any]]:
    """Runs the stages, and returns what each found."""
    for name in STAGES:
        run_stage(session, name)
    return {name: read_json(session.workspace.stage_file(name))["facts"] for name in STAGES}


def row(structure: str, sparsity: float, facts: dict[str, dict[str, Any]]) -> str:
    """One line of the table: speed as a multiple of the dense model's, by batch size."""
    export, figures = facts["export"], facts["benchmark"]["figures"]
    weights, batches = export["weights"], list(figures["batches"].values())

    def speeds(name: str) -> str:
        return " / ".join(f"{batch[name]['ratio']:.2f}" for batch in batches)

    cells = (
        structure,
        f"{sparsity:.0%}",
        f"{export['weights_zeroed'] / weights:.1%}",
        f"{export['weights_gone'] / weights:.1%}",
        export["layout"],
        f"{export['bytes'] / _MIB:.0f}",
        f"{facts['prune']['pruned']['perplexity']:.2f}",
        f"{batches[0]['peak_memory_gib']['ratio']:.2f}",
        speeds("prefill_tokens_per_s"),
        speeds("decode_tokens_per_s"),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    measured = [f"benchmark.{name}={getattr(arguments, name)}" for name in ("batch_sizes", "rounds", "new_tokens")]
    sizes = " / ".join(str(size) for size in arguments.batch_sizes)
    names = (
        "structure",
        "asked",
        "zeroed",
        "gone",
        "form",
        "MiB",
        "perplexity",
        f"memory, batch {arguments.batch_sizes[0]}",
    )
    names = (*names, f"prefill, batch {sizes}", f"decode, batch {sizes}")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    for structure, settings in STRUCTURES.items():
        for sparsity in arguments.sparsities:
            session = open_session(
                arguments.project, *settings, "prune.shots=1", f"prune.sparsity={sparsity}", "run.keep=all", *measured
            )
            facts = facts_of(session)
            if sparsity == arguments.sparsities[0] and structure == next(iter(STRUCTURES)):
                dense = facts["export"]["bytes_dense"] / _MIB
                print(
                    f"| dense | | | | | {dense:.0f} | {facts['evaluate']['perplexity']:.2f} | 1 | 1 | 1 |", flush=True
                )
            print(row(structure, sparsity, facts), flush=True)


if __name__ == "__main__":
    main()
