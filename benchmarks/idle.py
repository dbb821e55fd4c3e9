"""How long commands take when nothing is left to do: a finished run again, and `dvc repro` without a change.

Usage: python -m benchmarks.idle [--project DIR] [--rounds 5]

The project is one whose last `dvc repro` (or `surgeon run`) has finished, such as this directory after `make run`. Each
round starts every command once, in a process of its own, beside one that only imports torch and transformers. Prints
medians of seconds, smallest and largest in brackets. (A run writes down how it went, so the first `dvc repro` after it
repeats the report stage.)
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
IMPORTS = "import torch, transformers.modeling_utils, transformers.models.auto.modeling_auto"
COMMANDS = {
    "imports of torch and transformers alone": [sys.executable, "-c", IMPORTS],
    "surgeon run": [str(BIN / "surgeon"), "run", "--quiet"],
    "surgeon run --engine inline": [str(BIN / "surgeon"), "run", "--quiet", "--engine", "inline"],
    "surgeon status": [str(BIN / "surgeon"), "status", "--json"],
    "dvc repro, after these": [str(BIN / "dvc"), "repro"],
    "dvc repro": [str(BIN / "dvc"), "repro"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(given.rounds + 1):  # the first is not counted
        for name, command in COMMANDS.items():
            begun = time.perf_counter()
            environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
            subprocess.run(command, cwd=given.project, env=environment, check=True, capture_output=True)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    print("| command | seconds |")
    print("|---|---|")
    for name, found in seconds.items():
        print(f"| `{name}` | {statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f}) |")


if __name__ == "__main__":
    main()
