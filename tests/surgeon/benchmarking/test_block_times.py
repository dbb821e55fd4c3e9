"""The table of times by shape: its form, and that every described family can be measured."""

import numpy as np
import pytest
import torch

from surgeon.benchmarking.block_times import BlockTimes, measure_block_times, monotone
from surgeon.errors import ModelError
from surgeon.models import build_skeleton, discover

TABLE = BlockTimes(
    neurons=(0, 64, 128), mlp_s=(0.0, 0.5, 2.0), groups=(0, 1, 2), attention_s=(0.0, 1.0, 1.5), rest_s=3.0, n_blocks=2
)


def measure(checkpoint, rounds=1):
    return measure_block_times(checkpoint, torch.float32, "cpu", batch_size=2, length=8, rounds=rounds)


@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied", "qwen3", "gemma", "gpt_neox", "phi"])
def test_families(checkpoint_of, family, one_thread):
    times = measure(checkpoint_of(family))
    architecture = discover(build_skeleton(checkpoint_of(family), torch.float32))
    coupling = architecture.couplings[0]
    assert times.groups == tuple(range(coupling.attention.n_kv_heads + 1))
    assert times.neurons[0] == 0
    assert times.neurons[-1] == (48 if family in ("llama-gqa-tied", "qwen3") else 64)
    assert len(times.neurons) == len(times.mlp_s) == 9
    assert times.n_blocks == 3
    for seconds in (times.mlp_s, times.attention_s):
        assert seconds[0] == 0.0
        assert list(seconds) == sorted(seconds)
    assert times.attention_s[-1] > 0
    assert times.rest_s > 0


def test_shapes_that_are_run_are_those_asked_for(checkpoint_of, monkeypatch, one_thread):
    seen = set()
    real = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        seen.add(tuple(weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    times = measure(checkpoint_of("qwen3"))
    for width in times.neurons:
        assert {(width, 32), (32, width)} <= seen
    for kept in times.groups[1:]:
        assert {(kept * 32, 32), (kept * 16, 32), (32, kept * 32)} <= seen, "two query heads of 16 to a group"


def test_interpolation():
    assert TABLE.mlp(32) == 0.25
    assert TABLE.mlp(np.array([0, 64, 96, 128])).tolist() == [0.0, 0.5, 1.25, 2.0]
    assert TABLE.attention(np.array([[0, 1], [2, 2]])).tolist() == [[0.0, 1.0], [1.5, 1.5]]


def test_total_is_the_sum_of_the_parts():
    assert TABLE.dense_s == 3.0 + 2 * (2.0 + 1.5) == TABLE.total([128, 128], [2, 2])
    assert TABLE.total([64, 0], [1, 0]) == 3.0 + 0.5 + 1.0
    assert TABLE.total([0, 0], [0, 0]) == TABLE.rest_s


def test_json_and_back():
    assert BlockTimes.from_json(TABLE.to_json() | {"more": 1}) == TABLE


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0, 2.0], (0.0, 1.0, 2.0)),
        ([0.0, 3.0, 1.0, 5.0], (0.0, 2.0, 2.0, 5.0)),
        ([0.0, 3.0, 2.0, 1.0], (0.0, 2.0, 2.0, 2.0)),
        ([0.0, -1.0, 2.0], (0.0, 0.0, 2.0)),
    ],
)
def test_monotone(values, expected):
    assert monotone(values) == expected


def test_a_family_without_description_is_refused(checkpoint_of):
    with pytest.raises(ModelError, match=r"which linears of a 'falcon' block form neurons and heads.*Llama"):
        measure(checkpoint_of("falcon"))


def test_sequences_beyond_the_positions_are_refused(checkpoint_of):
    with pytest.raises(ModelError, match=r"got sequences of 129 tokens, but the model's positions end at 128"):
        measure_block_times(checkpoint_of("llama"), torch.float32, "cpu", batch_size=1, length=129)
