"""Two tiny models side by side: sizes, turns, memory, and what a worker that dies leaves."""

import os
import signal

import pytest
from tiny import make_tiny
from transformers import AutoModelForCausalLM

from surgeon.benchmarking import BenchmarkSettings, Side, benchmark, sizes_only
from surgeon.benchmarking.comparison import Compared
from surgeon.benchmarking.process import WorkerProcess
from surgeon.errors import BenchmarkError, InputError

# The larger model has 60 MiB more of weights than the smaller, so that memory shows it.
LARGE = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 272}
SETTINGS = BenchmarkSettings(batch_sizes=(1, 3), prompt=4, new_tokens=2, rounds=3)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    large = make_tiny("llama-gqa-tied", folder / "large", **LARGE)
    small = make_tiny("llama-gqa-tied", folder / "small", max_shard_size="20KB")
    return Side("dense", large), Side("pruned", small)


@pytest.fixture(scope="module")
def found(sides):
    said = []
    result = benchmark(*sides, SETTINGS, lambda size, figures: said.append((size, figures)))
    return result, said


def test_bytes_and_parameters_are_exact(sides, found):
    result, _ = found
    for side, name in zip(sides, ("dense", "pruned"), strict=True):
        on_disk = sum(path.stat().st_size for path in side.directory.glob("*.safetensors"))
        model = AutoModelForCausalLM.from_pretrained(side.directory)
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert getattr(result.sizes["weight_bytes"], name) == on_disk
        assert getattr(result.sizes["parameters"], name) == counted == side.stored_parameters
    assert len(list(sides[1].directory.glob("*.safetensors"))) > 1, "the small one is in shards"
    assert result.sizes["parameters"].ratio < 0.01


def test_the_models_take_turns_and_each_begins_in_turn(found):
    result, said = found
    assert said == [(1, None), (1, result.batches[0]), (3, None), (3, result.batches[1])]
    assert [figures.batch_size for figures in result.batches] == [1, 3]
    for figures in result.batches:
        assert figures.order == ("dense", "pruned", "pruned", "dense", "dense", "pruned")
        assert len(figures.spans) == 6
        for (_, end), (begin, _) in zip(figures.spans, figures.spans[1:], strict=False):
            assert end <= begin, "only one computes at a time"


def test_figures_are_positive_and_lie_within_their_spread(found):
    result, _ = found
    for figures in result.batches:
        for compared in (figures.prefill, figures.decode):
            assert compared.dense > 0
            assert compared.ratio == pytest.approx(compared.pruned / compared.dense)
            assert 0 < compared.spread[0] <= compared.ratio <= compared.spread[1]


def test_the_larger_model_takes_more_memory(found):
    result, _ = found
    weights = (result.sizes["weight_bytes"].dense - result.sizes["weight_bytes"].pruned) / 2**30
    assert weights > 0.05
    idle, loaded = result.sizes["idle_gib"], result.sizes["loaded_gib"]
    assert loaded.pruned > idle.pruned > 0
    assert loaded.dense >= idle.dense + 0.9 * weights
    for figures in result.batches:
        assert figures.memory_gib.dense - figures.memory_gib.pruned > 0.5 * weights
        assert figures.memory_gib.dense >= idle.dense + 0.9 * weights
        assert figures.device_memory_gib is None


def test_cache_of_a_token(found):
    result, _ = found
    cache = result.sizes["cache_bytes_per_token"]
    blocks, kv_heads, keys_and_values, float32 = 3, 2, 2, 4
    assert cache.dense == blocks * kv_heads * keys_and_values * float32 * 512 // 4
    assert cache.pruned == blocks * kv_heads * keys_and_values * float32 * 32 // 4


def test_json_has_what_was_found(found):
    result, _ = found
    plain = result.to_json()
    assert plain["weight_bytes"]["dense"] == result.sizes["weight_bytes"].dense
    assert plain["batches"]["3"]["decode_tokens_per_s"]["ratio_min"] == result.batches[1].decode.spread[0]
    assert plain["dtype"] == {"dense": "float32", "pruned": "float32"}
    assert plain["last_logits_only"] == {"dense": True, "pruned": True}
    assert plain["failure"] is None
    assert set(plain["machine"]) == {"cpu", "threads", "device", "torch"}


def test_without_rounds_no_model_is_loaded(sides, found, monkeypatch):
    monkeypatch.setattr("surgeon.benchmarking.comparison.WorkerProcess", None)
    result = benchmark(*sides, BenchmarkSettings(rounds=0))
    assert result == sizes_only(*sides, BenchmarkSettings())
    assert result.batches == ()
    for name, compared in result.sizes.items():
        assert compared == found[0].sizes[name]


def test_ratio_is_that_of_medians():
    compared = Compared.of_rounds([1.0, 2.0, 4.0], [3.0, 2.0, 2.0])
    assert (compared.dense, compared.pruned, compared.ratio) == (2.0, 2.0, 1.0)
    assert compared.spread == (0.5, 3.0)


def killed_at(monkeypatch, batch_size, answer=None):
    """Makes the process of the pruned model die when it is asked for a batch size."""
    send = WorkerProcess.send

    def send_and_kill(self, request):
        if self.name == "pruned" and request.get("batch_size") == batch_size:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait()
        send(self, request)

    monkeypatch.setattr(WorkerProcess, "send", send_and_kill)


def test_a_worker_that_dies_leaves_what_was_measured(sides, monkeypatch):
    killed_at(monkeypatch, 3)
    settings = BenchmarkSettings(batch_sizes=(1, 3, 5), prompt=4, new_tokens=1, rounds=1)
    result = benchmark(*sides, settings)
    assert [figures.batch_size for figures in result.batches] == [1]
    assert result.failure.startswith("batch size 3: the process of the pruned model was ended by SIGKILL")
    assert result.failure.endswith("leave 3 out of batch_sizes, or lower prompt")


def test_a_model_that_cannot_be_loaded(sides, tmp_path):
    make_tiny("llama", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(BenchmarkError, match=r"the process of the pruned model failed: .*no-such-model"):
        benchmark(sides[0], Side("pruned", tmp_path / "damaged"), SETTINGS)


def test_positions_end_before_the_sequences(sides):
    with pytest.raises(InputError, match=r"prompt \+ new_tokens: got 130 tokens, but the positions of .* end at 128"):
        benchmark(*sides, BenchmarkSettings(prompt=120, new_tokens=10))
