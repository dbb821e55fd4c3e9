"""Speed of a store in a bucket beside one in a directory, in one go: a large object, and many small ones.

Usage: python -m benchmarks.store_bucket s3://bucket/prefix [--directory DIR] [--rounds 3] [--small 100] [--moto]

With --moto a server of S3's protocol is started on loopback, and the bucket is made in it: what is measured then is the
work of Surgeon, of the library and of that server (Python, one thread), not a network. Each round writes to new keys.
"Read there" opens the object in a store with an empty cache: fetched, digest checked, written to the disk, read. "Read
again" opens it once more.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.store import Store, StorePlace, SymmetricMatrix, digest_text

SIDE = 4096
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a new prefix of a bucket")
    parser.add_argument("--directory", type=Path, default=None, help="for local stores; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", type=int, default=100, help="number of small objects")
    parser.add_argument("--moto", action="store_true", help="start a server on loopback")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as name, moto(given.url) if given.moto else nullcontext():
        folder = Path(name)
        places = {
            "directory": [StorePlace(folder / "directory")] * 2,
            "bucket": [StorePlace(folder / "here", given.url), StorePlace(folder / "there", given.url)],
        }
        columns = ["write, MiB/s", "read there, MiB/s", "read again, MiB/s", "small: write, ms", "find, ms", "read, ms"]
        print(f"| store | {' | '.join(columns)} |")
        print(f"|{'---|' * 7}")
        for kind, (here, there) in places.items():
            rounds = [one_round(here.open(), there.open(), f"{kind}-{n}", given.small) for n in range(given.rounds + 1)]
            cells = [f"{statistics.median(column):,.1f}" for column in zip(*rounds[1:], strict=True)]
            print(f"| {' | '.join([kind, *cells])} |", flush=True)


def one_round(here: Store, there: Store, name: str, n_small: int) -> list[float]:
    """Speeds of a large symmetric matrix (of all its elements), and milliseconds of each small object."""
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    matrix += matrix.T.copy()
    large, mib = digest_text(name), matrix.nbytes / MIB
    packed = SymmetricMatrix.from_full(matrix)
    speeds = [
        mib / seconds(lambda: here.commit(large, "m", {"m": packed}, {})),
        mib / seconds(lambda: there.open(large)["m"]),
        mib / seconds(lambda: there.open(large)["m"]),
    ]
    keys = [digest_text(f"{name}/{number}") for number in range(n_small)]
    vector = {"v": np.ones(64, dtype=np.float32)}

    def each(action: Callable[[str], Any]) -> float:
        return 1000 * seconds(lambda: [action(key) for key in keys]) / n_small

    def write(key: str) -> None:
        with here.lock(key):
            here.commit(key, "v", vector, {"n": 1})

    return [*speeds, each(write), each(there.lookup), each(lambda key: there.open(key)["v"])]


def seconds(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


@contextmanager
def moto(url: str) -> Iterator[None]:
    """A server on loopback with the bucket of a URL; the environment names it."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = address
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket=url.split("/")[2])
        yield
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
