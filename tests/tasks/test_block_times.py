"""Times of blocks are measured once for a machine and a shape of batch, and then read."""

import pytest
import torch
from tiny import make_tiny

from surgeon.models import resolve_model
from surgeon.store import StorePlace
from tasks.block_times import block_times_task, read_block_times
from tasks.context import Context, describe_model


@pytest.fixture
def context(tmp_path):
    checkpoint = resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "models")
    return Context(
        StorePlace(tmp_path / "store"), describe_model(checkpoint, "float32"), "cpu", batch_size=2, blocks_per_group=3
    )


def test_second_call_reads(context, one_thread, monkeypatch):
    first = block_times_task(context, 2, 8)
    monkeypatch.setattr("tasks.block_times.measure_block_times", None)
    second = block_times_task(context, 2, 8)
    assert (first.cached, second.cached) == (False, True)
    assert second.value == first.value
    times = read_block_times(context, second.value)
    assert times.to_json().items() <= first.value.attributes.items()
    assert (times.neurons[-1], times.groups) == (48, (0, 1, 2, 3, 4))
    assert (first.value.attributes["batch_size"], first.value.attributes["length"]) == (2, 8)


def test_another_batch_or_machine_is_measured_again(context, one_thread):
    first = block_times_task(context, 2, 8)
    assert not block_times_task(context, 1, 8).cached
    assert not block_times_task(context, 2, 4).cached
    torch.set_num_threads(2)
    assert not block_times_task(context, 2, 8).cached
    torch.set_num_threads(1)
    assert block_times_task(context, 2, 8).value == first.value
