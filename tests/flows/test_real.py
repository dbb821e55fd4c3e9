"""The whole job on the real built-in model, small: it must come out as a model that works."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.flows.project import Project

PARAMS = {
    "calibrate": {"sequences": 4, "length": 64},
    "evaluate": {"windows": 4, "length": 64},
    "prune": {"sparsity": 0.05, "shots": 1},
    "benchmark": {"batch_sizes": [2], "prompt": 8, "new_tokens": 2, "rounds": 1},
    "report": {"new_tokens": 4},
    "run": {"engine": "inline", "keep": "none"},
}


@pytest.mark.real
def test_the_built_in_model_is_pruned_and_still_speaks(models_directory: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", PARAMS)
    done = project.surgeon("run", "--json", SURGEON_MODELS=str(models_directory), OMP_NUM_THREADS="2")
    assert done.status == 0, done.stderr
    results = json.loads(done.stdout)
    dense, pruned = results["dense"], results["pruned"]
    assert dense["parameters"] == 134_515_008
    assert pruned["sparsity"] == pytest.approx(2 * 64 / 1536 * 0.75, abs=1e-6), "two steps of 64 neurons a block"
    assert dense["perplexity"] < pruned["perplexity"] < 2 * dense["perplexity"]
    assert results["samples"]["dense"]["continuation"].strip().startswith("Paris")
    assert not (project.data / "models").exists()
    export = project.data / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    facts = results["export"]
    assert facts["layout"] == "stock"
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == facts["parameters"] == dense["parameters"] - facts["weights_gone"]
    on_disk = sum(file.stat().st_size for file in export.glob("*.safetensors"))
    assert on_disk == pytest.approx(facts["bytes_dense"] - 4 * facts["weights_gone"], rel=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer(results["samples"]["pruned"]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        continued = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(continued[0, ids.shape[1] :]) == results["samples"]["pruned"]["continuation"]
