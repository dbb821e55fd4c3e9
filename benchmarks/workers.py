"""How much faster curvature is with two workers: `python -m benchmarks.workers [--shards 4] [--runners dask ray]`.

The same shards with one thread each, in alternation: one worker, then two. What is measured is the time from the first
pass to the last sum, with the workers already there: statistics of the built-in model, none of which is in the store.
Needs SURGEON_TEXT_DIR.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from flows.opening import open_session
from flows.params import Params
from flows.session import Session
from flows.statistics import BlockStatistics

_WARM = 16
"""Tokens of the sequences that start the workers before anything is measured."""


def parameters(runner: str, workers: int, shards: int, sequences: int, length: int) -> Params:
    folder = os.environ.get("SURGEON_TEXT_DIR")
    if folder is None:
        sys.exit("SURGEON_TEXT_DIR does not name a folder with WikiText-2 (valid.txt, test.txt)")
    text = Path(folder)
    return Params.model_validate(
        {
            "calibrate": {"text": {"source": str(text / "valid.txt")}, "sequences": sequences, "length": length},
            "evaluate": {"text": {"source": str(text / "test.txt")}, "windows": 1, "length": length},
            "prune": {"structure": "units"},
            "run": {"engine": "inline", "runner": runner, "workers": workers, "threads": 1, "shards": shards},
        }
    )


def measure(session: Session, label: str) -> float:
    """Seconds that the statistics of all blocks take."""
    calibration = session.calibration()
    found = BlockStatistics(
        session, session.dense, calibration, label, session.recipe.curvature, linears=session.measured_linears
    )
    start = time.perf_counter()
    found.ensure(set(range(session.model.n_blocks)))
    return time.perf_counter() - start


def run(runner: str, workers: int, given: argparse.Namespace) -> tuple[float, str]:
    """Seconds, and the digest of a statistic."""
    with tempfile.TemporaryDirectory() as folder:
        params = parameters(runner, workers, given.shards, given.sequences, given.length)
        with open_session(Path(folder), params, quiet=True) as session:
            small = params.model_copy(
                update={"calibrate": params.calibrate.model_copy(update={"sequences": given.shards, "length": _WARM})}
            )
            warm = Session(small, session.workspace, session.engine)
            warm.__dict__.update(checkpoint=session.checkpoint, model=session.model, context=session.context)
            measure(warm, "warm-up")
            seconds = measure(session, "measured")
            references = [ref for ref in session.store.entries() if ref.label.startswith("measured/block")]
            digests = [ref.digest for ref in sorted(references, key=lambda ref: ref.label)]
        return seconds, digests[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runners", nargs="+", default=["dask"])
    given = parser.parse_args()
    print("| runner | one worker, s | two workers, s | ratio |\n|---|---|---|---|")
    for runner in given.runners:
        pairs = []
        for _ in range(given.rounds):
            (one, first), (two, second) = run(runner, 1, given), run(runner, 2, given)
            assert first == second, "two workers have other bits"
            pairs.append((one, two))
            print(f"{runner}: {one:.1f} s, {two:.1f} s", file=sys.stderr, flush=True)
        ratios = sorted(one / two for one, two in pairs)
        one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
        gain = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {runner} | {one:.1f} | {two:.1f} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
