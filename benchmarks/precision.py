"""How far passes in bfloat16 or TensorFloat-32 are from float32 on a real model: factors, order of costs, perplexity.

Usage: SURGEON_TEXT_DIR=... python -m benchmarks.precision [--device cuda] [--sequences 24] [--structure units]

One shot of SmolLM2-135M on the shared protocol (benchmarks/protocol.py) in each mode; without a GPU in bfloat16 alone.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.gpu_checks import Made, differences, rank_correlation, shot_of
from benchmarks.protocol import open_session

MODES = {"float32": [], "bfloat16": ["model.dtype=bfloat16"], "tf32": ["run.precision=tf32"]}


def main() -> None:
    """Runs the modes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--structure", default="rows-and-columns")
    given = parser.parse_args()
    made: dict[str, Made] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode, more in MODES.items():
            if mode == "tf32" and given.device == "cpu":
                continue
            shared = [f"run.device={given.device}", "run.keep=all", "prune.shots=1", "prune.sparsity=0.1"]
            overrides = [*shared, f"prune.structure={given.structure}", *more]
            made[mode] = shot_of(open_session(Path(folder) / mode, *overrides, sequences=given.sequences))
        print("| passes in | A | G | least rank correlation of costs | dense perplexity | after a shot of 10% |")
        print("|---|---|---|---|---|---|")
        for mode, each in made.items():
            far = differences(each, made["float32"])
            factors = " | ".join(f"{far[kind]:.2e}" for kind in ("input-factors A", "output-factors G"))
            rank = rank_correlation(each, made["float32"])
            print(f"| {mode} | {factors} | {rank:.4f} | {each.perplexity:.3f} | {each.pruned_perplexity:.3f} |")


if __name__ == "__main__":
    main()
