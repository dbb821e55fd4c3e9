"""What a worker process does with a task that is sent to it: makes sure that it is a fit place, then runs it.

A result says nothing about who computed it, so a worker must compute as its key says: with the same code, the same
libraries, the same kind of device and the same number of threads, on the store and the model of the run.
"""

import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

import surgeon
from surgeon.errors import ClusterError
from tasks.context import Context
from tasks.stage import Outcome

T = TypeVar("T")
_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "safetensors")


@dataclass(frozen=True)
class Fingerprint:
    """What numbers depend on beside their keys.

    Attributes:
        python: major and minor version.
        libraries: versions by name, in order.
        code: digest of the sources of `surgeon` and `tasks`.
    """

    python: str
    libraries: tuple[tuple[str, str], ...]
    code: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs in another, each as "torch 2.12.0 instead of 2.13.0"."""
        mine, others = dict(self.libraries), dict(other.libraries)
        found = [
            f"{name} {others[name]} instead of {version}" for name, version in mine.items() if others[name] != version
        ]
        if self.python != other.python:
            found.append(f"Python {other.python} instead of {self.python}")
        if self.code != other.code:
            found.append(f"other sources of Surgeon ({other.code[:8]} instead of {self.code[:8]})")
        return found


@cache
def fingerprint() -> Fingerprint:
    """That of this process."""
    versions = tuple((name, importlib.metadata.version(name).partition("+")[0]) for name in _LIBRARIES)
    return Fingerprint(f"{sys.version_info.major}.{sys.version_info.minor}", versions, _code_digest())


def _code_digest() -> str:
    """Digest of all modules of the two packages that compute, by path and content."""
    digest = hashlib.sha256()
    for package in (Path(surgeon.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{path.relative_to(package).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Call:
    """A task for a worker. Small, picklable.

    Attributes:
        body: the task.
        arguments: what it is called with; the first is the context.
        fingerprint: of the process that wants it.
        threads: of torch on a CPU; None leaves them as they are.
    """

    body: Callable[..., Outcome[Any]]
    arguments: tuple[Any, ...]
    fingerprint: Fingerprint
    threads: int | None


def run_call(call: Call) -> Outcome[Any]:
    """Runs a task in this process.

    Raises:
        ClusterError: this process would compute something else, or does not see what the task reads.
    """
    context: Context = call.arguments[0]
    require_fit(call.fingerprint, context)
    if call.threads is not None and torch.get_num_threads() != call.threads:
        torch.set_num_threads(call.threads)
    return call.body(*call.arguments)


def require_fit(wanted: Fingerprint, context: Context) -> None:
    """Refuses work that this process is not fit for.

    Raises:
        ClusterError: naming the host and what is wrong there.
    """
    host = platform.node()
    if different := wanted.differences(fingerprint()):
        raise ClusterError(
            f"run.runner: the worker on {host} has {', '.join(different)}, so its results would not be those that "
            "their keys stand for. Install the same versions there."
        )
    if context.device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"run.device: the run is on cuda, but the worker on {host} sees no GPU. Start workers where there is one, "
            "or set run.device=cpu."
        )
    places = {"model.source": context.model.checkpoint.path}
    if context.store.url is None:  # a bucket is reached from anywhere, and opening it tells what is wrong
        places["run.store"] = context.store.root / "format.json"
    for what, path in places.items():
        if not path.exists():
            raise ClusterError(
                f"{what}: the worker on {host} does not see {path}. Put it on a file system that all workers share, "
                "under the same path."
            )
