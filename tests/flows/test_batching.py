"""Batches sized to memory, and halved where a GPU runs out of it. The errors are torch's own; the GPU is a CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.batching import ENOUGH_TOKENS, largest_batch
from flows.engine import InlineEngine
from flows.needs import require_memory
from flows.params import Params, load_params
from flows.planning import outline_run
from flows.session import Session
from flows.stages import run_all
from flows.workspace import Workspace
from surgeon.choices import Precision
from surgeon.errors import MemoryShortageError, ParameterError
from surgeon.memory import MemoryEstimate
from surgeon.passes.blockwise import BlockwiseModel
from tests.flows.sessions import Runs

pytestmark = pytest.mark.usefixtures("in_process")
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
PRUNE = {"sparsity": 0.3, "shots": 2, "structure": "rows-and-columns"}


class SmallGpu:
    """Makes a block fail as a GPU does, whenever more sequences than it holds run through it with a graph.

    Args:
        holds: sequences.
        grad: whether only passes with a graph fail, which need more memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: int, *, grad: bool = True) -> None:
        self.failed = 0
        run_block = BlockwiseModel.run_block

        def limited(model: BlockwiseModel, index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
            if len(hidden) > holds and (torch.is_grad_enabled() or not grad):
                self.failed += 1
                raise torch.OutOfMemoryError(MESSAGE)
            return run_block(model, index, hidden, call)

        monkeypatch.setattr(BlockwiseModel, "run_block", limited)


def session(root: Path, params: dict[str, Any], **run: Any) -> Session:
    sections = params | {"prune": PRUNE, "run": params["run"] | run}
    said: list[str] = []
    made = Session(Params.model_validate(sections), Workspace(root), InlineEngine(), warn=said.append)
    made.check()
    made.said = said  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_that_does_not_fit_is_halved_and_the_run_goes_on(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    asked = run_all(session(tmp_path / "asked", small, batch_size=2, blocks_per_group=groups))
    gpu = SmallGpu(monkeypatch, holds=3)
    run = session(tmp_path / "halved", small, batch_size=8, blocks_per_group=groups)
    results = run_all(run)
    assert gpu.failed == 2, "8 and 4 were too many"
    assert results["weights_digest"] == asked["weights_digest"]
    assert results["provenance"]["batch_size"] == 2
    assert results["provenance"]["batch_size_asked"] == 8
    assert results["pruned"] == asked["pruned"]
    said = " ".join(run.said)  # type: ignore[attr-defined]
    assert "CUDA out of memory" in said
    assert "goes on with 4 sequences at a time instead of 8" in said
    assert "goes on with 2 sequences at a time instead of 4" in said
    shapes = {e.label: run.store.parameters(e.key).get("batch_size") for e in run.store.entries()}
    assert shapes["shot-01/block-00/input-factors"] == 2, "keys hold what was used"


def test_the_next_run_starts_with_what_is_known_to_fit(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SmallGpu(monkeypatch, holds=3)
    first = run_all(session(tmp_path, small, batch_size=8))
    (remembered,) = json.loads((tmp_path / "data" / "memory.json").read_text()).values()
    assert remembered == {"asked": 8, "batch_size": 2, "blocks_per_group": 2}
    gpu.failed = 0
    again = session(tmp_path, small, batch_size=8)
    assert again.context.batch_size == again.batch_size == 2
    assert run_all(again)["weights_digest"] == first["weights_digest"]
    assert gpu.failed == 0
    assert session(tmp_path, small, batch_size=4).batch_size == 4, "another number was asked for, and may fit"


def test_one_sequence_that_does_not_fit_is_one_clear_error(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SmallGpu(monkeypatch, holds=0, grad=False)
    run = session(tmp_path, small, batch_size=4)
    message = r"out of memory of the GPU \(CUDA out of memory.*One sequence of 32 tokens and 2 block\(s\) .*lower calib"
    with pytest.raises(MemoryShortageError, match=message):
        run_all(run)
    assert gpu.failed == 3, "4, 2 and 1"


def test_blocks_are_halved_where_they_were_chosen(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SmallGpu(monkeypatch, holds=0)
    run = session(tmp_path, small, batch_size=1, blocks_per_group=None)
    with pytest.raises(MemoryShortageError, match=r"and 1 block\(s\) at a time"):
        run_all(run)
    assert gpu.failed == 2
    assert "with 1 blocks at a time instead of 2" in " ".join(run.said)  # type: ignore[attr-defined]


def test_memory_that_no_batch_changes_is_an_error_at_once(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(*_args: Any, **_more: Any) -> Any:
        calls.append(1)
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr("tasks.costs.structure_costs", full)
    run = session(tmp_path, small, batch_size=4)
    message = r"shot-01/block-00/costs ran out of memory of the GPU .*Fewer sequences at a time would not help"
    with pytest.raises(MemoryShortageError, match=message):
        run_all(run)
    assert len(calls) == 1
    assert run.batch_size == 4


def estimate(batch_size: int) -> MemoryEstimate:
    return MemoryEstimate.of([[(64, 64)] * 4] * 3, 64, 1000, batch_size * 32, 4, 1, pass_tokens=10**9)


def test_the_largest_power_of_two_that_fits() -> None:
    for batch in (1, 2, 8):
        assert largest_batch(estimate, estimate(batch).device_gib, 100, 32) == batch
        assert largest_batch(estimate, estimate(2 * batch).device_gib * 0.999, 100, 32) == batch
    assert largest_batch(estimate, 1e9, 6, 32) == 4, "no more than there are"
    assert largest_batch(estimate, 1e9, 10**6, 32) * 32 == ENOUGH_TOKENS
    assert largest_batch(estimate, 0.0, 100, 32) == 1


def test_on_a_cpu_null_is_four(tmp_path: Path) -> None:
    given = Session(load_params(None, ["run.device=cpu"]), Workspace(tmp_path), InlineEngine())
    assert given.params.run.batch_size is None
    assert given.batch_size == given.training_batch == 4
    larger = Session(load_params(None, ["run.device=cpu", "run.batch_size=9"]), Workspace(tmp_path), InlineEngine())
    assert larger.batch_size == larger.training_batch == 9


class OnGpu(Session):
    """A session that takes this machine for one with a GPU, as long as nothing is computed."""

    device = "cuda"


def test_on_a_gpu_its_free_memory_counts(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.batching.describe_device", lambda kind: f"{kind} (a GPU)")
    sections = small | {"run": {"engine": "inline"}}

    def with_free(n_bytes: float) -> Session:
        asked: list[str] = []
        free = lambda kind: asked.append(kind) or int(n_bytes)  # noqa: E731
        return OnGpu(Params.model_validate(sections), Workspace(tmp_path), InlineEngine(), free_bytes=free)

    roomy = with_free(2**40)
    assert (roomy.batch_size, roomy.context.blocks_per_group) == (4, 2), "6 sequences: no more than 4 at a time"
    assert roomy.training_batch == 4
    one = roomy.memory_estimate(1, 1).device_gib
    tight = with_free(1.3 * one * 2**30)
    assert (tight.batch_size, tight.context.blocks_per_group) == (1, 1)
    with pytest.raises(ParameterError, match=r"run\.memory_gib: one block at a time needs about"):
        _ = with_free(0.5 * one * 2**30).context


def test_a_run_on_a_gpu_is_planned_for_both_memories(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.batching.describe_device", lambda kind: f"{kind} (a GPU)")
    sections = small | {"prune": PRUNE, "run": {"engine": "inline", "batch_size": 2, "blocks_per_group": 1}}
    parts = Params.model_validate(sections), Workspace(tmp_path), InlineEngine()
    on_cpu, on_gpu = Session(*parts), OnGpu(*parts, free_bytes=lambda _kind: 2**40)
    cpu, gpu = (outline_run(each).needs.memory for each in (on_cpu, on_gpu))
    assert not cpu.on_gpu
    estimate = on_gpu.memory_estimate(1)
    row = "prune: curvature"
    assert gpu.on_gpu[row] == estimate.device_gib
    assert gpu.by_stage[row] - gpu.idle == pytest.approx(estimate.host_gib)
    assert cpu.by_stage[row] - cpu.idle == pytest.approx(estimate.device_gib + estimate.boundaries / 2**30)
    assert gpu.by_stage["prune: costs"] < cpu.by_stage["prune: costs"] == gpu.on_gpu["prune: costs"] + cpu.idle
    require_memory(on_gpu, gpu, available_gib=1.0)
    on_gpu.free_bytes = lambda _kind: int(estimate.device_gib * 2**30 / 2)
    with pytest.raises(ParameterError, match=r"evaluate|curvature needs about .* GiB of the GPU's memory.*are free"):
        require_memory(on_gpu, gpu, available_gib=1.0)
    with pytest.raises(ParameterError, match=r"needs about .* GiB, but 0\.0 GiB are available"):
        require_memory(on_cpu, cpu, available_gib=1e-6)


def test_tf32_is_in_every_key_and_has_no_effect_on_a_cpu(small: dict[str, Any], tmp_path: Path) -> None:
    context = Runs(small, tmp_path).session({"shots": 1}).context
    assert context.dtype == "float32"
    assert replace(context, precision=Precision.TF32).dtype == "tf32"
    for overrides, message in (
        (["run.device=cpu", "run.precision=tf32"], "tf32 has no effect on a CPU"),
        (
            ["model.dtype=bfloat16", "run.precision=tf32"],
            r"run\.precision tf32 has no effect with model\.dtype",
        ),
    ):
        with pytest.raises(ParameterError, match=message):
            load_params(None, overrides)
    if not torch.cuda.is_available():
        auto = Session(load_params(None, ["run.precision=tf32"]), Workspace(tmp_path), InlineEngine())
        with pytest.raises(ParameterError, match=r"run\.precision: tf32 has no effect on a CPU.*there is none"):
            _ = auto.precision
