"""The tables of docs/scaling.md are what the code of plans says now."""

import pytest

from benchmarks.random_checkpoints import SHAPES
from benchmarks.scaling import DOCUMENT, row
from benchmarks.scaling_model import ScalingModel, computed_rates, read_machines
from surgeon.planning import Operation


@pytest.mark.parametrize("structure", ["units", "rows-and-columns"])
def test_the_document_says_what_the_code_says(structure, tmp_path):
    """Of the smallest model, on all machines; the others come out of the same call."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.split(f"### `structure: {structure}`")[1].split("###")[0]
    model = ScalingModel(SHAPES["opt-125m"], structure, tmp_path)
    machines = read_machines()
    for key, machine in machines.items():
        line = row("125M", key, model.cost(machine), machines)
        assert line in section, "run python -m benchmarks.scaling --write"


def test_a_shot_of_a_smaller_model_takes_less_of_everything(tmp_path):
    machine = read_machines()["gpu80"]
    small = ScalingModel(SHAPES["opt-125m"], "units", tmp_path / "a").cost(machine)
    large = ScalingModel(SHAPES["opt-1.3b"], "units", tmp_path / "b").cost(machine)
    assert small is not None and large is not None
    assert sum(small.first.values()) < small.seconds < large.seconds
    assert small.device_gib < large.device_gib
    assert small.disk_gib < large.disk_gib
    assert small.moved_gib < large.moved_gib


def test_rates_from_a_data_sheet():
    rates = computed_rates({"half": 100.0, "single": 10.0, "double": 1.0, "memory": 50.0}).per_second
    assert set(rates) == set(Operation) - {Operation.SECONDS}
    assert rates[Operation.FORWARD] == pytest.approx(0.4 * 50)
    assert rates[Operation.GRAM] == pytest.approx(0.5 * 50)
    assert rates[Operation.SOLVES] == pytest.approx(0.5 * 0.5)
    assert rates[Operation.COPIES] == pytest.approx(0.5 * 50)
