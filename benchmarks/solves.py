"""Peak memory and time of costs and of an update of one linear: random factors of full rank, units of single columns.

Usage: python -m benchmarks.solves [--sides 4096] [--removed 0.2]

Each is a process of its own. Memory is what is added to what the factors (float32) and the weight take, in matrices of
the side of the larger factor in float64.
"""

import argparse
import json
import subprocess
import sys

_GIB = 2**30
_CHILD = """
import json, sys, time
import torch
from surgeon.choices import Cost, Curvature, UpdateRule
from surgeon.curvature.factors import LinearFactors
from surgeon.peak import peak_gib, reset_peak
from surgeon.pruning.elimination import eliminate
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear
from surgeon.pruning.structure_update import update_structures
from surgeon.recipe import Damping, UpdateSpec

what, n, removed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
generator = torch.Generator().manual_seed(0)
def factor(side):
    x = torch.randn(side + side // 2, side, generator=generator)
    return x.T @ x / len(x)
n_out = 3 * n // 8
linear = PrunedLinear.dense(torch.randn(n_out, n, generator=generator), None)
factors = LinearFactors(activations=factor(n), gradients=factor(n_out))
keep = torch.rand(n, generator=generator) >= removed
reset_peak()
before, start = peak_gib(), time.perf_counter()
live = live_linear(linear, factors, Curvature.KFAC, Damping(0.1, 0.1), "linear")
if what == "costs":
    eliminate(live, torch.arange(n), n, Cost.OBS, "linear", 32)
else:
    update_structures(live, linear.live_rows, keep, UpdateSpec(UpdateRule.EXACT), "linear")
print(json.dumps({"seconds": time.perf_counter() - start, "gib": peak_gib() - before}))
"""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[4096])
    parser.add_argument("--removed", type=float, default=0.2)
    arguments = parser.parse_args()
    print("| side | what | seconds | GiB | matrices |\n|---|---|---|---|---|", flush=True)
    for side in arguments.sides:
        for what in ("costs", "update"):
            command = [sys.executable, "-c", _CHILD, what, str(side), str(arguments.removed)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            matrices = found["gib"] * _GIB / (8 * side * side)
            print(f"| {side} | {what} | {found['seconds']:.1f} | {found['gib']:.2f} | {matrices:.1f} |", flush=True)


if __name__ == "__main__":
    main()
