"""A project directory in a temporary place, and the command run in it as real processes.

Most commands run in a process forked from one that has imported everything already (multiprocessing's fork server): a
process of its own, with its own exit status and streams, that can be killed, without seconds of imports each.
`console` runs the installed command instead.
"""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from transformers import dynamic_module_utils

from surgeon.export import Probe, load_back
from surgeon.export.load_back_script import logits_of
from surgeon.models.quiet import quiet_transformers
from surgeon.store import Store

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("surgeon")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb"}
REMOVED = (
    *("SURGEON_STORE", "SURGEON_CACHE", "SURGEON_MODELS", "SURGEON_PROJECT", "SURGEON_SMOLLM2_WHEEL"),
    "PREFECT_API_URL",
)
_PRELOADED = [
    *("flows.cli", "flows.stages", "flows.status", "flows.inspection.command", "flows.render", "flows.display"),
    *("flows.prefect_engine", "flows.session", "flows.report.page", "pydoc_data.topics"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.generation.utils"),
]
_CONTEXT = multiprocessing.get_context("forkserver")


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in REMOVED} | ENVIRONMENT | more


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int
    stdout: str
    stderr: str

    def ok(self) -> "Finished":
        assert self.status == 0, self
        return self


class Started:
    """A process that runs."""

    def __init__(self, arguments: list[str], root: Path, more: dict[str, str]) -> None:
        self._streams = [root / f".stream-{number}" for number in (1, 2)]
        with _environment_of_server():
            self.process = _CONTEXT.Process(target=_child, args=(arguments, root, environment(**more), self._streams))
            self.process.start()

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> Finished:
        self.process.join()
        assert self.process.exitcode is not None
        texts = [stream.read_text() if stream.exists() else "" for stream in self._streams]
        for stream in self._streams:
            stream.unlink(missing_ok=True)
        return Finished(self.process.exitcode, *texts)


class Project:
    """A directory with parameters and, after a run, its data.

    Args:
        root: the directory; created.
        params: sections of params.yaml.
    """

    def __init__(self, root: Path, params: dict[str, Any]) -> None:
        self.root = root
        self.data = root / "data"
        self.objects = self.data / "store" / "objects"
        root.mkdir(parents=True, exist_ok=True)
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        self.params = params

    def copy(self, root: Path) -> "Project":
        """The same project with the same results in another place."""
        shutil.copytree(self.root, root)
        return Project(root, self.params)

    def start(self, *arguments: str, **more: str) -> Started:
        return Started(list(arguments), self.root, more)

    def surgeon(self, *arguments: str, **more: str) -> Finished:
        return self.start(*arguments, **more).wait()

    def console(self, *arguments: str, **more: str) -> Finished:
        """Runs the installed command."""
        done = subprocess.run(
            [COMMAND, *arguments], cwd=self.root, env=environment(**more), capture_output=True, text=True, check=False
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def read(self, name: str) -> Any:
        return json.loads((self.data / name).read_text())

    def results(self) -> Any:
        return self.read("metrics/run.json")

    def executed(self) -> dict[str, set[str]]:
        """Kinds of tasks that the last run executed, by stage."""
        timings = {path.stem: self.read(f"timings/{path.name}") for path in (self.data / "timings").iterdir()}
        return {stage: set(timing["seconds"]) for stage, timing in timings.items() if timing["executed"]}

    def labels(self) -> dict[str, str]:
        """Labels of all objects of the store, by key."""
        if not self.objects.is_dir():
            return {}
        return {reference.key: reference.label for reference in Store(self.data / "store").entries()}

    def contents(self) -> dict[str, bytes]:
        """Every file of every object but the records, by path."""
        files = (path for path in self.objects.rglob("*") if path.is_file() and path.name != "record.json")
        return {str(path.relative_to(self.objects)): path.read_bytes() for path in files}


FIRST_LEVEL = ("input-factors", "output-factors", "diagonal", "gradient")
"""Kinds of objects that the pass through a group of blocks makes, beside what is named as its task."""
SECOND_LEVEL = ("moments", "kronecker-terms")


def tasks_of(labels: set[str], first_blocks: tuple[int, ...] = (0,)) -> set[str]:
    """Names of the tasks that make the objects with these labels, if groups of blocks begin at `first_blocks`."""
    tasks = set()
    for label in labels:
        place, _, kind = label.rpartition("/")
        if kind == "shot":
            continue
        if kind in (*FIRST_LEVEL, *SECOND_LEVEL):
            shot, block = place.split("/block-")
            first = max(b for b in first_blocks if b <= int(block))
            label = f"{shot}/block-{first:02d}/{'curvature' if kind in FIRST_LEVEL else kind}"
        tasks.add(label)
    return tasks


def slow(value: object) -> Any:
    """A case of a parametrised test that is left out of a quick run, where others like it are."""
    return pytest.param(value, marks=pytest.mark.slow)


def write_text(path: Path, seed: int, n_words: int = 1500) -> Path:
    """A text of random words, the same for the same seed."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(300)]
    path.write_text(" ".join(draw.choices(words, k=n_words)) + "\n")
    return path


@contextmanager
def _environment_of_server() -> Iterator[None]:
    """The fork server takes its environment from whoever starts the first process."""
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _child(arguments: list[str], root: Path, variables: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, ("stdout", "stderr")[number - 1], os.fdopen(number, "w", closefd=False))
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(root)
    sys.argv = ["surgeon", *arguments]
    from flows.cli import main

    load_back.fresh_logits = logits_here
    main()


def logits_here(directory: Path, probe: Probe, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Loads an export in this process, which spares seconds of imports; `console` and the tests of export do not."""
    tokens = {"input_ids": probe.input_ids, "attention_mask": probe.attention_mask}
    with (
        quiet_transformers(),
        tempfile.TemporaryDirectory() as modules,
        mock.patch.object(dynamic_module_utils, "HF_MODULES_CACHE", modules),
    ):
        return logits_of(str(directory), tokens, str(dtype).removeprefix("torch."), trust_remote_code)
