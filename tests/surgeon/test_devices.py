"""Processes claim GPUs by locks; here the GPUs are names."""

import subprocess
import sys
from pathlib import Path

import pytest

from surgeon.devices import claim_device, free_bytes, place_of
from surgeon.errors import ParameterError

TWO = ("gpu-a", "gpu-b")
HOLD = """
import sys
from pathlib import Path
from surgeon.devices import claim_device
claim = claim_device("cuda", sys.argv[2:], Path(sys.argv[1]))
print(claim.device, claim.others, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that claims one of some devices and keeps it; gives it and what it claimed."""
    started = []

    def start(*names):
        command = [sys.executable, "-c", HOLD, str(tmp_path), *names]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_processes_take_the_lowest_free_device_and_share_when_there_are_more(hold):
    first, claimed = hold(*TWO)
    assert claimed == "cuda:0 0"
    assert hold(*TWO)[1] == "cuda:1 0"
    assert hold(*TWO)[1] == "cuda:0 1"
    first.kill()
    first.wait()
    assert hold(*TWO)[1] == "cuda:0 0", "a killed process holds nothing"


def test_a_device_is_known_by_its_name_not_by_its_number(hold):
    """A worker to which only the second GPU is visible has it as its first."""
    assert hold("gpu-b")[1] == "cuda:0 0"
    assert hold(*TWO)[1] == "cuda:0 0"
    assert hold(*TWO)[1] == "cuda:0 1"


def test_the_cpu_needs_no_claim(tmp_path: Path):
    assert claim_device("cpu", (), tmp_path / "none").device == place_of("cpu") == "cpu"
    assert not (tmp_path / "none").exists()
    assert free_bytes("cpu") > 0


def test_no_device_is_an_error(tmp_path: Path):
    with pytest.raises(ParameterError, match=r"run\.device: cuda was asked for, but this torch sees no such device"):
        claim_device("cuda", (), tmp_path)


def test_a_crowd_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("surgeon.devices._MOST_SHARING", 1)
    held = claim_device("cuda", ("gpu-a",), tmp_path)
    with pytest.raises(ParameterError, match=r"run\.workers: each of 1 devices of kind cuda has 1 processes"):
        claim_device("cuda", ("gpu-a",), tmp_path)
    assert held.device == "cuda:0"
