"""A git repository with the project's own dvc.yaml and the parameters of a tiny run."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.flows.project import ROOT, Project, environment

STAGES = ("model", "calibrate", "evaluate", "prune", "recovery", "export", "benchmark", "report")


class Repository(Project):
    """A git repository with the project's pipeline and the parameters of a tiny run."""

    def __init__(self, root: Path, params: dict[str, Any]) -> None:
        everything = yaml.safe_load((ROOT / "params.yaml").read_text())
        super().__init__(root, {k: v | params.get(k, {}) if isinstance(v, dict) else v for k, v in everything.items()})
        for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, root)
        (root / ".dvc").mkdir()
        for name in (".dvc/config", ".dvc/.gitignore"):
            shutil.copy(ROOT / name, root / name)
        for package in ("surgeon", "tasks", "flows"):
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
        self.command("git", "init", "--quiet")
        self.commit()

    def clone(self, root: Path) -> "Repository":
        """A clone by git alone: no data, no store and no cache of DVC."""
        self.command("git", "clone", "--quiet", str(self.root), str(root))
        clone = object.__new__(Repository)
        Project.__init__(clone, root, copy.deepcopy(self.params))
        return clone

    def command(self, *arguments: str, **more: str) -> str:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        names = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            arguments,
            cwd=self.root,
            env=environment(PATH=programs, DVC_NO_ANALYTICS="1", **names, **more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def commit(self) -> None:
        self.command("git", "add", "--all")
        self.command("git", "commit", "--quiet", "--message", "state")

    def change(self, section: str, key: str, value: Any) -> None:
        self.params[section][key] = value
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params))

    def run(self) -> None:
        """All stages by one `surgeon run`, which DVC then takes as they are: quicker than a process a stage."""
        self.surgeon("run", "--quiet").ok()
        self.command("dvc", "commit", "--force", "--quiet")
        self.commit()

    def repro(self) -> set[str]:
        """Runs `dvc repro`; returns the stages that ran."""
        lines = self.command("dvc", "repro").splitlines()
        return {line.split("'")[1] for line in lines if line.startswith("Running stage")}

    def experiments(self) -> dict[str, Any]:
        """What `dvc exp show` knows of each finished experiment: metrics of run.json, parameters."""
        shown = json.loads(self.command("dvc", "exp", "show", "--json"))
        found = {}
        for baseline in shown:
            for experiment in baseline["experiments"] or []:
                (revision,) = experiment["revs"]
                data = revision["data"]
                found[revision["name"]] = {
                    "metrics": data["metrics"]["data/metrics/run.json"]["data"],
                    "params": data["params"]["params.yaml"]["data"],
                }
        return found

    def status(self) -> set[str]:
        """Stages that have a changed dependency, parameter or output."""
        return set(json.loads(self.command("dvc", "status", "--json")))


def bytes_once(*folders: Path) -> int:
    """What folders take on disk together: every file once, however many names it has."""
    sizes = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                status = path.stat()
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
