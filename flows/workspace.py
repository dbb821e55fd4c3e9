"""Where a run keeps its files."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.errors import ParameterError
from surgeon.store import StorePlace, is_url

STORE_VARIABLE = "SURGEON_STORE"
MODELS_VARIABLE = "SURGEON_MODELS"
_STORE = "data/store"
_EXPERIMENTS = (".dvc", "tmp", "exps")


@dataclass(frozen=True)
class Workspace:
    """The files of a run, below one directory.

    Attributes:
        root: project directory; results go to ``root/data``.
        store_option: store the user asked for, a directory or a URL; the variable `SURGEON_STORE` wins over it.
        cache_option: directory before a store in a bucket; the variable `SURGEON_CACHE` wins over it.
    """

    root: Path
    store_option: str | None = None
    cache_option: str | None = None

    @property
    def data(self) -> Path:
        """Everything runs produce."""
        return self.root / "data"

    @property
    def home(self) -> Path:
        """The project itself: for a DVC experiment in a directory of its own, the project that it was started in."""
        return project_of(self.root)

    @property
    def store(self) -> StorePlace:
        """Where the content-addressed store is; experiments share that of their project.

        Raises:
            ParameterError: a cache is given for a store that is a directory.
        """
        chosen = os.environ.get(STORE_VARIABLE) or self.store_option or _STORE
        if is_url(chosen):
            return StorePlace((self.home / (self.cache_option or _STORE)).resolve(), chosen)
        if self.cache_option is not None:
            raise ParameterError(
                f"run.cache: has no effect, because the store is the directory {chosen}; it is the directory before a "
                "store in S3 (run.store: s3://bucket/prefix)"
            )
        return StorePlace((self.home / chosen).resolve())

    @property
    def models(self) -> Path:
        """Converted and fetched checkpoints; `SURGEON_MODELS` names a directory that projects share."""
        chosen = os.environ.get(MODELS_VARIABLE)
        return Path(chosen).expanduser().resolve() if chosen else self.home / "data" / "models"

    @property
    def view(self) -> Path:
        """The run's objects under readable names, browsable with Zarr."""
        return self.data / "run.zarr"

    @property
    def manifest(self) -> Path:
        """Readable names → references."""
        return self.data / "manifest.json"

    @property
    def recovery_view(self) -> Path:
        """The objects of the recovery stage, likewise: a stage of DVC of its own cannot write into another's."""
        return self.data / "recovery.zarr"

    @property
    def recovery_manifest(self) -> Path:
        """Readable names → references of the recovery stage; all begin with "recovery/"."""
        return self.data / "recovery.json"

    def view_of(self, name: str) -> Path:
        """Where a result lies in a view, by its readable name."""
        return (self.recovery_view if name.startswith("recovery/") else self.view) / name

    @property
    def export(self) -> Path:
        """The pruned checkpoint."""
        return self.data / "export"

    @property
    def metrics(self) -> Path:
        """The numbers of the run, for scripts and for DVC."""
        return self.data / "metrics" / "run.json"

    @property
    def curve(self) -> Path:
        """Sparsity and perplexity after each shot, which DVC plots: of a file with several lists it mixes them up."""
        return self.data / "metrics" / "shots.json"

    @property
    def benchmark(self) -> Path:
        """Speed and memory of the dense and the exported model."""
        return self.data / "metrics" / "benchmark.json"

    @property
    def task_scores(self) -> Path:
        """What the dense and the exported model score on downstream tasks."""
        return self.data / "metrics" / "tasks.json"

    @property
    def report(self) -> Path:
        """The page about the run, for people."""
        return self.data / "report" / "index.html"

    @property
    def machine(self) -> Path:
        """How fast this machine is, as measured for `surgeon plan`."""
        return self.data / "machine.json"

    @property
    def memory(self) -> Path:
        """Batches that did not fit into the memory of a GPU, and what was used instead."""
        return self.data / "memory.json"

    @property
    def comparison(self) -> Path:
        """Tables and plots of `surgeon compare`."""
        return self.data / "compare"

    def stage_file(self, stage: str) -> Path:
        """What a stage found: the same bytes whenever it is run again."""
        return self.data / "stages" / f"{stage}.json"

    def timing_file(self, stage: str) -> Path:
        """How a stage went the last time: seconds, tasks executed and cached, memory."""
        return self.data / "timings" / f"{stage}.json"


def project_of(root: Path) -> Path:
    """The project that a directory belongs to: itself, unless DVC made it for an experiment below `.dvc/tmp/exps`."""
    inner = next((folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), None)
    if inner is None:
        return root
    for folder in inner.parents:
        if folder.parts[-len(_EXPERIMENTS) :] == _EXPERIMENTS:
            return folder.parents[len(_EXPERIMENTS) - 1] / root.relative_to(inner)
    return root


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step: it has the old content or the new, never a part."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step: it has the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Reads a JSON file; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
