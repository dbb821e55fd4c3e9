"""The whole job on the real built-in model, small: it must come out as a model that works."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import surgeon
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
    assert 0.05 <= pruned["sparsity"] < 0.0501
    assert dense["perplexity"] < pruned["perplexity"] < 2 * dense["perplexity"]
    assert results["samples"]["dense"]["continuation"].strip().startswith("Paris")
    assert not (project.data / "models").exists()
    export = project.data / "export"
    model = surgeon.load(export)
    facts = results["export"]
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"] <= pruned["nonzero"]
    assert facts["bytes"] < facts["bytes_dense"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer(results["samples"]["pruned"]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        continued = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(continued[0, ids.shape[1] :]) == results["samples"]["pruned"]["continuation"]
