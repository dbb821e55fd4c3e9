"""The commands that look at a run: status, evaluate, generate; inspect is in test_inspect.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.flows.project import Project
from tests.flows.test_kill import kill_when, n_objects


def status(project: Project, *more: str) -> list[dict[str, str]]:
    lines: list[dict[str, str]] = json.loads(project.surgeon("status", "--json", *more).ok().stdout)
    return lines


def test_status_before_half_way_and_after(params: dict[str, Any], tmp_path: Path) -> None:
    project = Project(tmp_path / "project", params)
    nothing = status(project)
    assert [line["found"] for line in nothing[:3]] == ["no", "no", "no"]
    assert [line["would_run"] for line in nothing[3:]] == ["the whole shot"] * 3
    assert project.labels() == {}
    # Sequences, windows, dense evaluation, shot 1 (15 objects), then six factors and one block's costs of shot 2.
    kill_when(project.start("run", "--quiet"), lambda: n_objects(project) >= 25)
    n_then = n_objects(project)
    half = {line["stage"]: line for line in status(project)}
    assert half["shot-01 (to 10.0%)"] == {"stage": "shot-01 (to 10.0%)", "found": "finished", "would_run": ""}
    second = half["shot-02 (to 20.0%)"]
    assert second["found"].startswith("statistics 3/3, costs ")
    assert "update" in second["would_run"]
    assert half["shot-03 (to 30.0%)"]["found"] == "not known before the shot above"
    assert n_objects(project) == n_then
    project.surgeon("run", "--quiet").ok()
    assert {line["would_run"] for line in status(project)} == {""}
    changed = {line["stage"]: line["would_run"] for line in status(project, "-S", "prune.damping=0.05")}
    assert changed["shot-01 (to 10.0%)"] == "costs, mask, update"
    assert changed["dense evaluation"] == ""


def test_status_as_a_table(again: Project) -> None:
    done = again.surgeon("status").ok()
    assert "shot-03 (to 30.0%)" in done.stdout
    assert "finished" in done.stdout
    assert done.stderr == ""


def test_evaluate_the_export(again: Project) -> None:
    before = set(again.data.rglob("stages/*"))
    export = json.loads(again.surgeon("evaluate", "data/export", "--json").ok().stdout)
    dense = json.loads(again.surgeon("evaluate", "--json").ok().stdout)
    results = again.results()
    assert export["perplexity"] == pytest.approx(results["pruned"]["perplexity"], rel=1e-5)
    assert (export["parameters"], export["linear_weights"]) == (
        results["export"]["parameters"],
        results["export"]["weights"] - results["export"]["weights_gone"],
    )
    for name in ("perplexity", "parameters", "nonzero", "linear_nonzero", "bytes"):
        assert dense[name] == results["dense"][name]
    assert set(again.data.rglob("stages/*")) == before
    assert again.surgeon("report", "--quiet").ok().stdout == ""
    assert again.results()["dense"] == results["dense"]


@pytest.mark.parametrize("model", ["dense", "pruned"])
def test_generate_continues_as_the_report_does(again: Project, model: str) -> None:
    sample = again.results()["samples"][model]
    done = again.surgeon("generate", sample["prompt"], "--model", model, "--tokens", "4").ok()
    assert done.stdout == sample["prompt"] + sample["continuation"] + "\n"
    assert done.stderr == ""


def test_generate_with_a_directory(again: Project) -> None:
    arguments = ("The capital of France is", "--model", "data/export", "--tokens", "4", "--json")
    sample = json.loads(again.surgeon("generate", *arguments).ok().stdout)
    assert sample == again.results()["samples"]["pruned"]


def test_what_there_is(finished: Project) -> None:
    done = finished.surgeon("--help").ok()
    for command in (
        "run",
        "model",
        "calibrate",
        "evaluate",
        "prune",
        "export",
        "benchmark",
        "report",
        "status",
        "inspect",
    ):
        assert f" {command} " in done.stdout
