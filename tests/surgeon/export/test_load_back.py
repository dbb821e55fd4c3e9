"""Exports that another process loads: one that knows nothing of Surgeon."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon
from surgeon.errors import ExportError
from surgeon.export import Probe, expected_logits, export_checkpoint, require_loads_back
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from tests.surgeon.export.exporting import PROBE, masked_logits
from tests.surgeon.export.test_forms import made


@pytest.mark.parametrize(("family", "kill"), [("llama-gqa-tied", "uniform"), ("qwen3", "everything")])
def test_a_fresh_process_finds_the_same_logits_or_nothing_is_written(family, kill, tmp_path):
    case = made(family, kill, tmp_path)
    plan, destination = case.plan(), tmp_path / "export"
    expected = expected_logits(BlockwiseModel(case.checkpoint, overrides=case.overrides), PROBE)
    torch.testing.assert_close(expected, masked_logits(case))

    def check(folder: Path) -> float:
        return require_loads_back(folder, PROBE, expected, torch.float32, plan.needs_code)

    done = export_checkpoint(plan, destination, "{{export}}", {"version": 1}, check)
    assert 0 <= done.facts["largest_logit_difference"] < 1e-5
    before = {path.name: path.read_bytes() for path in destination.iterdir()}

    def spoil_and_check(folder: Path) -> float:
        tensors = load_file(folder / "model.safetensors")
        next(t for name, t in tensors.items() if name.endswith("layers.1.self_attn.q_proj.weight"))[2, 2] += 1.0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return check(folder)

    with pytest.raises(ExportError, match="gives other logits"):
        export_checkpoint(plan, destination, "{{export}}", {"version": 2}, spoil_and_check)
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before


def test_what_does_not_load_is_an_error(tmp_path):
    case = made("llama", "everything", tmp_path)
    export_checkpoint(case.plan(), tmp_path / "export", "card", {"version": 1})
    (tmp_path / "export" / "modeling_pruned.py").write_text("this is no Python")
    with pytest.raises(
        ExportError, match=r"export does not load in a fresh Python process \(status 1\): .*SyntaxError"
    ):
        require_loads_back(tmp_path / "export", PROBE, torch.zeros(2, 18, 272), torch.float32, trust_remote_code=True)


def test_the_package_imports_nothing_heavy_until_a_model_is_loaded():
    code = "import surgeon, sys; print('torch' in sys.modules, callable(surgeon.load), 'torch' in sys.modules)"
    root = Path(surgeon.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False True True\n"


def test_probe_is_padded_on_the_left():
    probe = Probe.of([[5, 6, 7], [8]])
    assert probe.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert probe.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("kill", ["uniform", "everything"])
def test_our_loader_refuses_what_is_not_ours(kill, tmp_path):
    case, folder = made("llama", kill, tmp_path), tmp_path / "export"
    with pytest.raises(ExportError, match=r"is not an export of Surgeon: .* AutoModelForCausalLM.from_pretrained"):
        surgeon.load(case.checkpoint.path)
    export_checkpoint(case.plan(), folder, "card", {"version": 1})
    for file in folder.glob("*.py"):  # is not run
        file.write_text("raise SystemExit('this must not run')")
    assert surgeon.load(str(folder), "bfloat16", "cpu").dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ExportError, match=r"config.json is not the file that was exported"):
        surgeon.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config.json is not the file that was exported"):
        surgeon.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 9},
        {"layers": []},
        {"blocks": "model.nowhere"},
        {"layers": [{"heads": [4, 4], "linears": {"mlp": [1, 1, 1, 1]}}] * 3},
    ],
)
def test_a_description_that_does_not_fit_is_bad_input(changes, tmp_path):
    case, folder = made("llama", "free_widths", tmp_path), tmp_path / "export"
    export_checkpoint(case.plan(), folder, "card", {"version": 1})
    config = json.loads((folder / "config.json").read_text())
    config["pruned"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(surgeon.errors.ModelError, match=r"config.json"):
        BlockwiseModel(resolve_model(str(folder), tmp_path / "cache"))
