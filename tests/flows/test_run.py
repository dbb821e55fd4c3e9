"""`surgeon run` from start to end: its files, its numbers, and what a second run does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon
from surgeon.store import Store
from tests.flows.project import Finished, Project

SIZES = {"perplexity", "parameters", "nonzero", "bytes", "linear_weights", "linear_nonzero"}


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for n, m in model.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)]


def exported(project: Project) -> torch.nn.Module:
    return surgeon.load(project.data / "export")


def test_stdout_is_json_alone_and_is_what_was_written(finished_with_output: tuple[Project, Finished]) -> None:
    project, output = finished_with_output
    assert output.status == 0, output
    assert json.loads(output.stdout) == project.results()
    assert output.stderr == ""


def test_files(finished: Project) -> None:
    stages = {
        f"{name}.json"
        for name in ("model", "calibrate", "evaluate", "prune", "recovery", "export", "benchmark", "report")
    }
    assert {path.name for path in (finished.data / "stages").iterdir()} == stages
    assert {path.name for path in (finished.data / "timings").iterdir()} == stages
    assert {path.name for path in finished.data.iterdir()} == {
        *("export", "manifest.json", "metrics", "models", "recovery.json", "recovery.zarr", "report", "run.zarr"),
        *("stages", "store", "timings"),
    }
    assert not list((finished.data / "store" / "tmp").iterdir())


def test_keys_of_the_results(finished: Project) -> None:
    results = finished.results()
    assert set(results) == {
        *("dense", "pruned", "window_length", "windows", "overlap", "shots", "samples", "seconds", "elapsed_s"),
        *("export", "benchmark", "recovery", "peak_memory_gib", "tasks", "weights_digest", "provenance"),
    }
    assert set(results["dense"]) == SIZES
    assert set(results["pruned"]) == {*SIZES, "sparsity"}
    assert set(results["tasks"]) == {"executed", "cached"}
    kinds = {"input-factors", "output-factors", "costs", "mask", "update", "evaluation"}
    assert set(results["seconds"]) == {*kinds, "sequences", "windows", "spectra", "total"}
    assert [shot["shot"] for shot in results["shots"]] == [1, 2, 3]
    for shot in results["shots"]:
        assert set(shot) == {
            *("shot", "target", "sparsity", "perplexity", "loss", "threshold", "n_removed", "predicted_cost"),
            *("convergence", "kept", "seconds", "layerchop"),
        }
        assert set(shot["seconds"]) == kinds
        assert shot["convergence"] is None, "rows and columns are solved for directly"
    assert set(results["provenance"]) == {
        *("model", "parameters", "seed", "device", "precision", "batch_size", "batch_size_asked"),
        *("versions", "calibration", "evaluation"),
    }


def test_numbers_belong_together(finished: Project) -> None:
    results = finished.results()
    dense, pruned, last = results["dense"], results["pruned"], results["shots"][-1]
    assert dense["linear_nonzero"] == dense["linear_weights"]
    assert pruned["sparsity"] == pytest.approx(1 - pruned["linear_nonzero"] / pruned["linear_weights"], abs=1e-12)
    assert (pruned["perplexity"], pruned["sparsity"]) == (last["perplexity"], last["sparsity"])
    assert pruned["perplexity"] != dense["perplexity"]
    assert results["samples"]["dense"]["prompt"] == "The capital of France is"
    seconds = results["seconds"]
    assert seconds["total"] == pytest.approx(sum(value for kind, value in seconds.items() if kind != "total"))
    assert 0 < results["peak_memory_gib"] < 8
    # Sequences, windows, dense evaluation; shots of curvature, 3 costs, mask, 3 updates, evaluation; export,
    # benchmark, 2 samples, spectra of 3 blocks.
    assert results["tasks"]["executed"] == 3 + 3 * 9 + 7


def test_sparsity_is_met_to_within_one_structure(finished: Project, inputs: Path) -> None:
    modules = linears(AutoModelForCausalLM.from_pretrained(inputs / "model"))
    n_weights = sum(m.weight.numel() for m in modules)
    largest_structure = max(max(m.weight.shape) for m in modules)
    assert [shot["target"] for shot in finished.results()["shots"]] == [0.1, 0.2, 0.3]
    for shot in finished.results()["shots"]:
        assert 0 <= shot["sparsity"] - shot["target"] < largest_structure / n_weights


def test_export_is_smaller_by_what_was_removed(finished: Project, inputs: Path) -> None:
    """Free rows and columns: the compact form, whose weights are those that live, without the dead code of a block."""
    model, dense = exported(finished), AutoModelForCausalLM.from_pretrained(inputs / "model")
    results = finished.results()
    facts, pruned = results["export"], results["pruned"]
    assert (facts["layout"], facts["index_maps"], facts["trust_remote_code"]) == ("compact", True, True)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"] < facts["parameters_dense"]
    assert facts["parameters_dense"] == results["dense"]["parameters"]
    assert facts["weights_zeroed"] == pruned["linear_weights"] - pruned["linear_nonzero"]
    n_left = sum(m.weight.numel() for m in linears(model))
    assert facts["weights_gone"] == pruned["linear_weights"] - n_left > facts["weights_zeroed"]
    size = (finished.data / "export" / "model.safetensors").stat().st_size
    assert facts["bytes"] < size < facts["bytes"] + 20_000
    assert facts["largest_logit_difference"] < 1e-5
    before = dense.state_dict()
    kept = {name for name, tensor in model.state_dict().items() if name in before and "layers" not in name}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
    card = (finished.data / "export" / "README.md").read_text()
    assert f"| parameters in the files | {facts['parameters_dense']:,} | {facts['parameters']:,} |" in card
    assert "trust_remote_code=True" in card
    assert "{{" not in card
    assert finished.read("stages/export.json")["facts"] == facts
    assert json.loads((finished.data / "export" / "surgeon.json").read_text())["facts"].items() <= facts.items()
    assert AutoTokenizer.from_pretrained(finished.data / "export")("the").input_ids


def test_manifest_and_view_hold_the_run(finished: Project) -> None:
    import zarr

    manifest = finished.read("manifest.json")
    assert {name.split("/")[0] for name in manifest} == {
        *("calibration", "evaluation", "dense", "shot-01", "shot-02", "shot-03")
    }
    view = zarr.open_group(finished.data / "run.zarr", mode="r")
    stored = Store(finished.data / "store").open(manifest["shot-02/block-01/update"]["key"])
    name = "self_attn.q_proj/weight"
    assert (view[f"shot-02/block-01/update/{name}"][...] == stored.array(name)).all()


def test_second_run_executes_nothing(again: Project) -> None:
    first, weights = again.results(), again.data / "export" / "model.safetensors"
    before = (weights.read_bytes(), weights.stat().st_mtime_ns)
    objects = again.contents()
    done = again.surgeon("run", "--quiet").ok()
    second = again.results()
    assert (done.stdout, done.stderr) == ("", "")
    assert second["tasks"]["executed"] == 0
    assert second["tasks"]["cached"] == sum(first["tasks"].values())
    assert again.executed() == {}
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before
    assert again.contents() == objects
    volatile = ("tasks", "elapsed_s", "peak_memory_gib")
    assert {k: v for k, v in second.items() if k not in volatile} == {
        k: v for k, v in first.items() if k not in volatile
    }


def test_a_run_by_stages_is_the_same_run(params: dict[str, Any], finished: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "stages", params)
    for stage in ("model", "calibrate", "evaluate", "prune", "recovery", "export", "benchmark"):
        done = project.surgeon(stage, "--quiet").ok()
        assert (done.stdout, done.stderr) == ("", "")
    assert not (project.data / "metrics" / "run.json").exists()
    assert not (project.data / "report").exists()
    output = project.surgeon("report", "--json").ok()
    assert json.loads(output.stdout)["weights_digest"] == finished.results()["weights_digest"]
    assert project.contents() == finished.contents()
    for stage in ("model", "calibrate", "evaluate", "prune", "recovery", "export", "benchmark", "report"):
        assert project.read(f"stages/{stage}.json") == finished.read(f"stages/{stage}.json")


def test_a_stage_without_the_one_before_says_which_to_run(params: dict[str, Any], tmp_path: Path) -> None:
    done = Project(tmp_path / "early", params).surgeon("export")
    assert done.status == 2
    assert "the stage 'prune' has not run here yet. Run `surgeon prune` first" in done.stderr


def test_table_at_the_end(again: Project) -> None:
    done = again.surgeon("run").ok()
    pruned = again.results()["pruned"]
    for text in (f"{pruned['linear_nonzero']:,}", f"{pruned['perplexity']:.2f}", "0 tasks executed", "30.00%"):
        assert text in done.stdout


def test_grouping_of_blocks_does_not_change_a_bit(params: dict[str, Any], finished: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "one", params)
    project.surgeon("run", "--quiet", "-S", "run.blocks_per_group=1").ok()
    assert project.results()["weights_digest"] == finished.results()["weights_digest"]
    factors = {key for key, label in finished.labels().items() if label.endswith("-factors")}
    assert len(factors) == 2 * 9
    theirs = project.contents()
    for path, content in finished.contents().items():
        if path.split("/")[1] in factors:
            assert theirs[path] == content
    assert any(label.endswith("/boundary") for label in project.labels().values())
