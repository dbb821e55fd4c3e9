"""Memory of a run does not grow with the number of blocks: small widths of which blocks are most, in real processes."""

import json
from pathlib import Path

import pytest

from benchmarks.big_models import overrides
from benchmarks.random_checkpoints import SHAPES, make_checkpoint
from tests.flows.project import Project

FLAT = 1.05
"""How much more eight blocks may take than four."""
MOST_GIB = 0.7
"""What the process takes by itself is less; eight blocks of 13 MiB are more than 5% of it."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Peak resident memory by kind of result, and of all, of a shot of models with four and with eight blocks."""
    directory = tmp_path_factory.mktemp("big")
    return {blocks: _peaks(directory, blocks) for blocks in (4, 8)}


def _peaks(directory: Path, blocks: int) -> dict[str, float]:
    model = make_checkpoint(SHAPES["small"], directory / f"model-{blocks}", blocks)
    project = Project(directory / str(blocks), {})
    options = [part for value in overrides(model, "float32") for part in ("-S", value)]
    project.surgeon("prune", *options).ok()
    found: dict[str, float] = {}
    for path in project.objects.rglob("record.json"):
        record = json.loads(path.read_text())
        kind = record["label"].rpartition("/")[2]
        found[kind] = max(found.get(kind, 0.0), record["peak_memory_gib"] or 0.0)
    return found


@pytest.mark.parametrize("kind", ["evaluation", "boundary", "input-factors", "output-factors", "costs", "update"])
def test_peak_memory_is_flat_in_depth(peaks: dict[int, dict[str, float]], kind: str) -> None:
    few, many = (peaks[blocks][kind] for blocks in (4, 8))
    assert 0.3 < few < MOST_GIB, "four blocks more would not show"
    assert many <= FLAT * few, f"{kind}: {few:.3f} GiB with 4 blocks, {many:.3f} with 8"
