"""The digest of definitions changes with everything that a task is made of, and with nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from surgeon.downstream import definition_digest, definitions, paired_error
from surgeon.errors import TaskError

TASKS = Path(__file__).parents[2] / "local_tasks"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TASKS, tmp_path / "tasks")
    return tmp_path / "tasks"


def test_the_same_files_elsewhere_have_the_same_digest(folder):
    assert definition_digest(folder) == definition_digest(TASKS)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "utils.pyc").write_text("x")
    assert definition_digest(folder) == definition_digest(TASKS)


@pytest.mark.parametrize("name", ["questions.jsonl", "local_choice.yaml", "utils.py"])
def test_files_count(folder, name):
    before = definition_digest(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    assert definition_digest(folder) != before


def test_data_outside_counts(folder, tmp_path):
    data = tmp_path / "elsewhere.jsonl"
    data.write_text("{}\n")
    definition = folder / "local_text.yaml"
    definition.write_text(definition.read_text().replace("texts.jsonl", str(data)) + "process_docs: !function a.b\n")
    before = definition_digest(folder)
    data.write_text('{"text": "x"}\n')
    assert definition_digest(folder) != before


def test_the_version_counts(monkeypatch):
    before = definition_digest(None)
    assert before != definition_digest(TASKS)
    monkeypatch.setattr(definitions, "harness_version", lambda: "0.0.1")
    assert definition_digest(None) != before


def test_a_directory_without_definitions(tmp_path):
    with pytest.raises(TaskError, match=r"is not a directory with definitions of tasks: it holds no \.yaml file"):
        definition_digest(tmp_path)


def test_paired_error_is_that_of_the_mean_difference():
    draw = np.random.default_rng(0)
    dense, pruned = draw.normal(size=7), draw.normal(size=7)
    differences = pruned - dense
    variance = sum((d - differences.mean()) ** 2 for d in differences) / 6
    assert paired_error(dense, pruned) == pytest.approx((variance / 7) ** 0.5, rel=1e-12)
    assert paired_error(dense, dense + 1.0) == pytest.approx(0.0, abs=1e-12)
    assert paired_error(dense[:1], pruned[:1]) is None
    with pytest.raises(ValueError, match="7 and 6 documents: both models must have scored the same"):
        paired_error(dense, pruned[:6])
