"""A run that takes whole blocks out: what it exports, shows and finds again."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny

from tests.flows.project import Project


@pytest.fixture(scope="module")
def shorter(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after a run that took two of five blocks out. Tests do not change it."""
    folder = tmp_path_factory.mktemp("shorter")
    make_tiny("qwen2", folder / "model", num_hidden_layers=5, **{"use_sliding_window": True, "sliding_window": 8})
    prune = {"method": "layerchop", "layerchop": {"selector": "output", "blocks": 2}}
    project = Project(folder / "project", {**params, "model": {"source": str(folder / "model")}, "prune": prune})
    project.surgeon("run", "--quiet").ok()
    return project


def removed_of(project: Project) -> list[int]:
    removed: list[int] = project.read("stages/prune.json")["facts"]["state"]["removed"]
    return removed


def test_the_export_is_a_stock_model_with_fewer_blocks(shorter: Project) -> None:
    facts, removed = shorter.results()["export"], removed_of(shorter)
    assert len(removed) == 2
    assert (facts["layout"], facts["blocks_dense"], facts["blocks_removed"]) == ("stock", 5, removed)
    config = shorter.read("export/config.json")
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (3, 3)
    assert f"gone: {removed[0]}, {removed[1]} (counted from 0)" in (shorter.data / "export" / "README.md").read_text()
    assert facts["bytes"] == facts["bytes_dense"] * facts["parameters"] / facts["parameters_dense"]


def test_it_is_what_was_measured(shorter: Project) -> None:
    found = json.loads(shorter.surgeon("evaluate", "data/export", "--json").ok().stdout)
    pruned = shorter.results()["pruned"]
    assert found["perplexity"] == pytest.approx(pruned["perplexity"], rel=1e-5)
    assert found["linear_weights"] == pruned["linear_nonzero"]


def test_a_second_run_has_nothing_to_do(shorter: Project) -> None:
    shorter.surgeon("run", "--quiet").ok()
    assert shorter.results()["tasks"]["executed"] == 0


def test_inspecting(shorter: Project, tmp_path: Path) -> None:
    removed = removed_of(shorter)
    done = shorter.surgeon("inspect", "--json", "--plot", str(tmp_path / "run.png")).ok()
    view = json.loads(done.stdout)
    assert view["anatomy"]["removed"] == removed
    sparsities = {int(block): totals["sparsity"] for block, totals in view["blocks"].items()}
    assert sparsities == {block: float(block in removed) for block in range(5)}
    assert view["shots"]["1"]["sparsity"] == pytest.approx(0.4)
    assert view["shots"]["1"]["predicted_cost"] is None
    table = shorter.surgeon("inspect").ok().stdout
    assert all(f"{block}, removed" in table for block in removed)
    assert (tmp_path / "run.png").stat().st_size > 0


def test_inspecting_a_block_that_is_gone_and_one_that_is_not(shorter: Project) -> None:
    gone, left = removed_of(shorter)[0], 0
    assert f"block {gone} after shot 1: removed whole" in shorter.surgeon("inspect", "--block", str(gone)).ok().stdout
    view = json.loads(shorter.surgeon("inspect", "--block", str(gone), "--json").ok().stdout)
    assert view["removed"] is True
    assert {(li["n_live"], li["live_rows"], li["sparsity"]) for li in view["linears"]} == {(0, 0, 1.0)}
    view = json.loads(shorter.surgeon("inspect", "--block", str(left), "--json").ok().stdout)
    assert view["removed"] is False
    assert all(li["n_live"] == li["n_out"] * li["n_in"] and li["sparsity"] == 0 for li in view["linears"])
    wrong = shorter.surgeon("inspect", "--block", "5")
    assert (wrong.status, "the model has blocks 0 to 4" in wrong.stderr) == (2, True)


def test_the_report_says_which(shorter: Project) -> None:
    page = (shorter.data / "report" / "index.html").read_text()
    assert f"Gone whole: blocks {', '.join(map(str, removed_of(shorter)))}." in page
    assert "3 of 5 decoder blocks are left, numbered anew." in page
    assert "curvature None" not in page


def test_the_export_loses_more(shorter: Project, tmp_path: Path) -> None:
    """The export as the model of another run: what is left can be pruned by units, or lose another block."""
    export = shorter.data / "export"
    for name, prune in {
        "units": {"structure": "units", "sparsity": 0.3, "shots": 1, "multiple": 4},
        "blocks": {"method": "layerchop", "layerchop": {"blocks": 1}},
    }.items():
        project = Project(tmp_path / name, {**shorter.params, "model": {"source": str(export)}, "prune": prune})
        project.surgeon("run", "--quiet").ok()
        facts = project.results()["export"]
        assert (facts["layout"], facts["blocks_dense"]) == ("stock", 3)
        assert len(facts["blocks_removed"]) == (name == "blocks")
        assert facts["bytes"] < facts["bytes_dense"]
