"""`surgeon benchmark`: as a stage that is not repeated for nothing, and as a command for any two models."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny

from tests.flows.project import Project

TINY = {"batch_sizes": [1, 2], "prompt": 4, "new_tokens": 2, "rounds": 1}
SET = [f"-Sbenchmark.{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def measured(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after a run with a tiny benchmark. Tests copy it."""
    project = finished.copy(tmp_path_factory.mktemp("measured") / "project")
    done = project.surgeon("run", *SET).ok()
    assert "benchmark: batch size 1: prefill" in done.stderr
    assert "benchmark: batch size 2: prefill" in done.stderr
    for text in ("weight files, MiB", "prefill, batch 1, tokens/s", "decode, batch 2, tokens/s", "perplexity"):
        assert text in done.stdout
    return project


def test_figures(measured: Project) -> None:
    figures = measured.read("metrics/benchmark.json")
    assert measured.results()["benchmark"] == figures == measured.read("stages/benchmark.json")["facts"]["figures"]
    weights = measured.data / "export" / "model.safetensors"
    assert figures["weight_bytes"]["pruned"] == weights.stat().st_size
    assert figures["parameters"]["dense"] == measured.results()["dense"]["parameters"]
    assert set(figures["batches"]) == {"1", "2"}
    for batch in figures["batches"].values():
        assert batch["order"] == ["dense", "pruned"]
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_gib"):
            assert batch[name]["ratio"] == batch[name]["pruned"] / batch[name]["dense"] > 0
    assert figures["failure"] is None


def test_a_second_run_does_not_measure_again(measured: Project, tmp_path: Path) -> None:
    project = measured.copy(tmp_path / "project")
    stage = (project.data / "stages" / "benchmark.json").read_bytes()
    project.surgeon("run", "--quiet", *SET).ok()
    assert project.results()["tasks"]["executed"] == 0
    assert (project.data / "stages" / "benchmark.json").read_bytes() == stage


@pytest.mark.parametrize(
    ("change", "path"),
    [("settings", ("settings", "prompt")), ("machine", ("machine", "cpu")), ("export", ("export", "config.json"))],
)
def test_measured_again_when_something_is_another(
    measured: Project, tmp_path: Path, change: str, path: tuple[str, str]
) -> None:
    project = measured.copy(tmp_path / "project")
    found = project.read("stages/benchmark.json")
    found["facts"]["measured"][path[0]][path[1]] = "another"
    (project.data / "stages" / "benchmark.json").write_text(json.dumps(found))
    project.surgeon("benchmark", "--quiet", "--if-changed", *SET).ok()
    assert project.executed()["benchmark"] == {"benchmark"}
    now = project.read("stages/benchmark.json")["facts"]["measured"]
    assert now == measured.read("stages/benchmark.json")["facts"]["measured"]


def test_the_command_measures_whatever_is_known(measured: Project, tmp_path: Path) -> None:
    project = measured.copy(tmp_path / "project")
    options = ("--batch-size", "3", "--prompt", "5", "--new-tokens", "1", "--rounds", "2")
    figures = json.loads(project.surgeon("benchmark", "--json", *options).ok().stdout)
    assert figures == project.read("metrics/benchmark.json")
    assert figures["batches"]["3"]["order"] == ["dense", "pruned", "pruned", "dense"]
    assert project.read("stages/benchmark.json")["facts"]["measured"]["settings"]["prompt"] == 5
    again = json.loads(project.surgeon("benchmark", "--json", *options).ok().stdout)
    assert again["batches"]["3"]["decode_tokens_per_s"] != figures["batches"]["3"]["decode_tokens_per_s"]


def test_figures_of_another_export_are_not_shown(measured: Project, tmp_path: Path) -> None:
    project = measured.copy(tmp_path / "project")
    other = ("-Sprune.sparsity=0.1", "-Sprune.shots=1", *SET)
    for stage in ("prune", "export"):
        project.surgeon(stage, "--quiet", *other).ok()
    assert json.loads(project.surgeon("report", "--json", *other).ok().stdout)["benchmark"] is None


def test_any_two_models(measured: Project, tmp_path: Path) -> None:
    project = measured.copy(tmp_path / "project")
    before = {path: path.read_bytes() for path in project.data.rglob("*.json")}
    small = make_tiny("opt", tmp_path / "small", num_hidden_layers=1)
    large = make_tiny("opt", tmp_path / "large", num_hidden_layers=4)
    done = project.surgeon("benchmark", str(small), "--against", str(large), "--json", *SET).ok()
    figures = json.loads(done.stdout)
    assert done.stderr == ""
    assert figures["parameters"]["ratio"] < 1
    assert figures["weight_bytes"]["dense"] == (large / "model.safetensors").stat().st_size
    written = {path for path in project.data.rglob("*.json") if path.read_bytes() != before.get(path)}
    assert {path.name for path in written} <= {"surgeon-files.json"}
    table = project.surgeon("benchmark", str(small), "--against", str(large), "--rounds", "0").ok().stdout
    assert "parameters" in table
    assert "prefill" not in table


def test_nothing_exported_yet(params: dict[str, Any], tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "model")
    project = Project(tmp_path / "early", params)
    done = project.surgeon("benchmark", "--against", str(tmp_path / "model"))
    assert done.status == 2
    assert "data/export holds no export to measure: run `surgeon export` first" in done.stderr


def test_options_that_do_not_go_together(finished: Project) -> None:
    done = finished.surgeon("benchmark", "data/export", "--if-changed")
    assert done.status == 2
    assert "--if-changed has no effect with MODEL or --against" in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_sizes=[]", "benchmark.batch_sizes"),
        ("batch_sizes=[0]", "benchmark.batch_sizes"),
        ("batch_sizes=[1, 1]", "batch_sizes has a number twice"),
        ("prompt=0", "benchmark.prompt"),
        ("new_tokens=0", "benchmark.new_tokens"),
        ("rounds=-1", "benchmark.rounds"),
        ("round=1", "Did you mean 'rounds'"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    from flows.params import load_params
    from surgeon.errors import ParameterError

    with pytest.raises(ParameterError, match=message.replace(".", r"\.")):
        load_params(None, [f"benchmark.{setting}"])


def test_a_failure_is_shown_and_raised() -> None:
    from rich.console import Console

    from flows.benchmark import raise_failure
    from flows.render_benchmark import render_benchmark
    from surgeon.errors import BenchmarkError

    one = {"dense": 2.0, "pruned": 1.0, "ratio": 0.5, "ratio_min": 0.4, "ratio_max": 0.6}
    batch = {"prefill_tokens_per_s": one, "decode_tokens_per_s": one, "peak_memory_gib": one}
    figures = {
        "weight_bytes": one,
        "parameters": one,
        "batches": {"8": {**batch, "device_peak_memory_gib": None}},
        "machine": {"cpu": "A", "threads": 2, "device": "cpu", "torch": "2"},
        "dtype": {"dense": "bfloat16", "pruned": "float32"},
        "last_logits_only": {"dense": True, "pruned": True},
        "disliked_widths": {"dense": [], "pruned": [f"width {n}" for n in range(7)]},
        "failure": "batch size 32: not enough memory",
    }
    console = Console(width=200)
    with console.capture() as capture:
        render_benchmark(figures, console)
    text = capture.get()
    for part in (
        "prefill, batch 8",
        "0.50 (0.40 to 0.60)",
        "batch size 32: not enough memory",
        "width 4",
        "2 more such",
    ):
        assert part in text
    assert "dense is bfloat16 and pruned is float32" in text
    with pytest.raises(BenchmarkError, match="benchmark: batch size 32: not enough memory"):
        raise_failure(figures)
