"""Speed of the store beside plain NumPy files: writing and reading matrices, side by side.

Usage: python -m benchmarks.store [--directory DIR] [--rounds 5]

The same matrix is written by `Store.commit` and by `numpy.save`, both flushed to the disk, and read by `Store.open` and
by `numpy.load`, from the page cache and from the disk (after the file's pages were dropped from the cache). The store
does more: a SHA-256 and checksums, chunks, which it counts on reading; of a symmetric factor it writes the lower
triangle, and mirrors it on reading. Speeds are those of the full matrix, in MiB/s, as medians; the ratio is that of
each round (smallest and largest in brackets), and 1 is the speed of a plain file.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.store import Store, SymmetricMatrix, digest_text
from surgeon.store.files import sync

SIDES = (576, 1536, 4096)
COLUMNS = ("write", "read, page cache", "read, disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"| matrix | MiB | {' | '.join(f'{name} | plain | ratio' for name in COLUMNS)} |")
    print(f"|{'---|' * (2 + 3 * len(COLUMNS))}")
    for symmetric in (True, False):
        for side in SIDES:
            with tempfile.TemporaryDirectory(dir=given.directory) as folder:
                print(row(side, symmetric, Path(folder), given.rounds), flush=True)


def row(side: int, symmetric: bool, folder: Path, rounds: int) -> str:
    """One line of the table."""
    matrix = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    if symmetric:
        matrix += matrix.T.copy()
    mine: dict[str, list[float]] = {name: [] for name in COLUMNS}
    plain: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for number in range(rounds + 1):
        times = one_round(matrix, symmetric, folder, digest_text(f"{number}"))
        if number:  # the first warms up
            for name in COLUMNS:
                mine[name].append(times[name])
                plain[name].append(times[f"plain {name}"])
    mib = matrix.nbytes / 2**20
    cells = [f"{side} x {side}{', symmetric' if symmetric else ''}", f"{mib:.1f}"]
    for name in COLUMNS:
        ratios = [p / m for m, p in zip(mine[name], plain[name], strict=True)]
        cells += [f"{mib / statistics.median(seconds):,.0f}" for seconds in (mine[name], plain[name])]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


def one_round(matrix: NDArray[np.float32], symmetric: bool, folder: Path, key: str) -> dict[str, float]:
    """Seconds of every action, in a store and a file of their own."""
    store, file = Store(folder / "store"), folder / "plain.npy"
    times: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        action()
        times[name] = time.perf_counter() - begun

    timed("write", lambda: store.commit(key, "m", {"m": wrapped(matrix, symmetric)}, {}))
    timed("plain write", lambda: save(file, matrix))
    for name in ("read, page cache", "read, disk"):
        if name == "read, disk":
            for path in (file, *store.path(key).rglob("*")):
                drop_pages(path)
        timed(name, lambda: store.open(key)["m"])
        timed(f"plain {name}", lambda: np.load(file))
    shutil.rmtree(store.root)
    file.unlink()
    return times


def wrapped(matrix: NDArray[np.float32], symmetric: bool) -> Any:
    return SymmetricMatrix.from_full(matrix) if symmetric else matrix


def save(file: Path, matrix: NDArray[np.float32]) -> None:
    np.save(file, matrix)
    sync(file)
    sync(file.parent)


def drop_pages(path: Path) -> None:
    """Drops a file from the page cache."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
