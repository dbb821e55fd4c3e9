"""Exports loaded with stock transformers, interrupted, damaged and repeated; and texts the models continue."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, byte_tokenizer, make_tiny
from transformers import AutoTokenizer, GenerationConfig

from surgeon.choices import ExportLayout
from surgeon.errors import ExportError
from surgeon.export import Probe, directory, export_checkpoint, is_exported
from surgeon.export.load_back import require_same_logits
from surgeon.generation import continue_prompt
from surgeon.store.files import temporary_name
from tests.surgeon.export.exporting import case_of, opened
from tests.surgeon.passes.stock import load_stock

TOKENS = torch.arange(4, 44).view(2, 20)
PROMPT = "the capital on the hill"
N_NEW = 12
CARD = "# Card: größer\n"
RECORD = {"version": 1, "weights_digest": "0123abc", "card": "Größe"}
pytestmark = pytest.mark.usefixtures("one_thread")


def remove(_index, live):
    """A row and a column of every linear, which with dense shapes are zeros."""
    for rows, columns in live.values():
        rows[3] = False
        columns[5] = False


def pruned_model(checkpoint, seed=0):
    """A model changed everywhere, and with zeroed rows and columns."""
    return case_of(checkpoint, remove, seed)


def write(case, destination, dtype="float32", record=RECORD, check=None):
    """Exports in dense shapes."""
    return export_checkpoint(case.plan(dtype, ExportLayout.DENSE), destination, CARD, record, check)


def logits_in_memory(case, dtype=torch.float32):
    with case.in_memory(dtype) as model:
        return logits(model)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def siblings(destination):
    """What lies beside an export, hidden names included, but for its model and the memory of hashes."""
    return {path.name for path in destination.parent.iterdir()} - {destination.name, "model", "cache"}


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def exported(folder, family="llama", **options):
    """A small export with its model."""
    checkpoint = opened(make_tiny(family, folder / "model", **options))
    case = pruned_model(checkpoint)
    write(case, folder / "export")
    return folder / "export", case


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_the_pruned_model(family, max_shard_size, tmp_path):
    checkpoint = opened(make_tiny(family, tmp_path / "model", max_shard_size=max_shard_size))
    case, destination = pruned_model(checkpoint), tmp_path / "export"
    files = write(case, destination).files
    assert set(files) | {"surgeon.json"} == {path.name for path in destination.iterdir()}
    assert (len(list(destination.glob("*.safetensors"))) > 2) == (max_shard_size == "20KB")
    expected, stock = logits_in_memory(case), load_stock(destination)
    assert torch.equal(logits(stock), expected)
    assert (logits(stock) - logits(load_stock(checkpoint.path))).abs().max() > 0.1
    state = stock.state_dict()
    for index in case.blocks:
        assert all(torch.equal(state[name], value) for name, value in case.overrides(index).items())
    tokenizer = AutoTokenizer.from_pretrained(destination, local_files_only=True)
    text = continue_prompt(stock, tokenizer, PROMPT, N_NEW)
    with case.in_memory() as model:
        assert text == continue_prompt(model, byte_tokenizer(), PROMPT, N_NEW)


@pytest.mark.parametrize("family", ["llama-gqa-tied", "opt", "gpt_neox"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_bfloat16_export(family, max_shard_size, tmp_path):
    checkpoint = opened(make_tiny(family, tmp_path / "model", max_shard_size=max_shard_size))
    case, destination = pruned_model(checkpoint), tmp_path / "export"
    write(case, destination, "bfloat16")
    stored_bytes = 0
    for file in destination.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened_file:
            assert {opened_file.get_tensor(name).dtype for name in opened_file.keys()} == {torch.bfloat16}  # noqa: SIM118
        stored_bytes += sum(t.numel() * t.element_size() for t in load_file(file).values())
    if max_shard_size == "20KB":
        index = json.loads((destination / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == stored_bytes
    stock = load_stock(destination, "auto")
    assert stock.dtype == stock.config.dtype == torch.bfloat16
    expected = logits_in_memory(case, torch.bfloat16)
    assert torch.equal(logits(stock), expected)


def test_a_half_precision_checkpoint_is_exported_in_float32(tmp_path):
    path = make_tiny("llama", tmp_path / "model")
    rewrite(path / "model.safetensors", lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype")
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    checkpoint = opened(path)
    case = pruned_model(checkpoint)
    write(case, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("float32", False)
    stock = load_stock(tmp_path / "export", "auto")
    assert stock.dtype == torch.float32
    assert torch.equal(logits(stock), logits_in_memory(case))


def test_names_in_the_files_stay_as_they_were(tmp_path):
    path = make_tiny("opt", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opened(path)
    case = pruned_model(checkpoint)
    write(case, tmp_path / "export")
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == renamed.keys()
    assert torch.equal(logits(load_stock(tmp_path / "export")), logits_in_memory(case))


def test_linears_that_are_not_those_of_the_model_are_an_error(tmp_path):
    checkpoint = opened(make_tiny("llama", tmp_path / "model"))
    case = pruned_model(checkpoint)
    case.blocks[1]["mlp.up"] = case.blocks[1].pop("mlp.up_proj")
    with pytest.raises(ExportError, match=r"block 1 has the linears .* but what was pruned is .*mlp.up; nothing was"):
        write(case, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_everything_else_is_there_and_no_pickle(tmp_path):
    path = make_tiny("llama", tmp_path / "model")
    pickles = ["pytorch_model.bin", "training_args.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.pickle", "old.gguf"]
    for name in [*pickles, "chat_template.jinja", "LICENSE", ".hidden", "README.md"]:
        (path / name).write_bytes(name.encode())
    (path / "onnx").mkdir()
    GenerationConfig(repetition_penalty=1.5, max_new_tokens=7, eos_token_id=[2, 9]).save_pretrained(path)
    checkpoint, destination = opened(path), tmp_path / "export"
    write(pruned_model(checkpoint), destination)
    assert {file.name for file in destination.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "surgeon.json",
    }
    assert (destination / "README.md").read_text(encoding="utf-8") == "# Card: größer\n"
    assert (destination / "chat_template.jinja").read_bytes() == b"chat_template.jinja"
    generation = GenerationConfig.from_pretrained(destination, local_files_only=True)
    assert (generation.repetition_penalty, generation.eos_token_id) == (1.5, [2, 9])
    before, after = (load_stock(folder).config.to_dict() for folder in (path, destination))
    assert {**after, "_name_or_path": ""} == {**before, "_name_or_path": ""}
    tokenizer = AutoTokenizer.from_pretrained(destination, local_files_only=True)
    assert tokenizer(PROMPT).input_ids == byte_tokenizer()(PROMPT).input_ids


def test_an_export_takes_the_place_of_the_one_before(tmp_path):
    destination, case = exported(tmp_path)
    (destination / "left-over.txt").write_text("old")
    before = logits(load_stock(destination))
    record = {**RECORD, "weights_digest": "other"}
    write(pruned_model(case.checkpoint, seed=1), destination, record=record)
    assert not (destination / "left-over.txt").exists()
    assert siblings(destination) == set()
    assert is_exported(destination, record)
    assert not is_exported(destination, RECORD)
    assert not torch.equal(logits(load_stock(destination)), before)


def test_the_same_export_twice_has_the_same_bytes(tmp_path):
    destination, case = exported(tmp_path)
    files = write(case, tmp_path / "again").files
    assert all((tmp_path / "again" / name).read_bytes() == (destination / name).read_bytes() for name in files)


def test_an_export_can_be_pruned_and_exported_again(tmp_path):
    first, _ = exported(tmp_path)
    checkpoint, record = opened(first), {**RECORD, "version": 2}
    write(pruned_model(checkpoint, seed=1), tmp_path / "second", record=record)
    assert is_exported(tmp_path / "second", record)
    assert is_exported(first, RECORD)


INTERRUPTED = """
import sys, time
from pathlib import Path
from surgeon.export import directory
from tests.surgeon.export.test_directory import opened, pruned_model, write

folder, write_safetensors, n_saved = Path(sys.argv[1]), directory.write_safetensors, 0

def slow(*args, **options):
    global n_saved
    n_bytes = write_safetensors(*args, **options)
    n_saved += 1
    if n_saved == 2:
        print("writing", flush=True)
        time.sleep(600)
    return n_bytes

directory.write_safetensors = slow
write(pruned_model(opened(folder / "model")), folder / "export", record={"version": 2})
"""


def test_a_killed_export_leaves_the_one_before_and_no_litter_for_long(tmp_path):
    destination, case = exported(tmp_path, max_shard_size="20KB")
    before = logits(load_stock(destination))
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "writing\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    (partial,) = siblings(destination)
    assert partial.startswith(".export.new-")
    assert len(list((tmp_path / partial).glob("*.safetensors"))) == 2
    assert is_exported(destination, RECORD)
    assert torch.equal(logits(load_stock(destination)), before)
    write(case, destination)
    assert siblings(destination) == set()
    assert is_exported(destination, RECORD)


def test_a_first_export_that_fails_leaves_nothing_at_the_destination(tmp_path, monkeypatch):
    checkpoint = opened(make_tiny("llama", tmp_path / "model", max_shard_size="20KB"))

    def full(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr(directory, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        write(pruned_model(checkpoint), tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert siblings(tmp_path / "export") == set()
    assert not is_exported(tmp_path / "export", RECORD)


def test_the_old_export_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    destination, case = exported(tmp_path)
    rename = Path.rename

    def refuse(self, target):
        if target == destination and "old" not in self.name:
            raise OSError("renaming failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="renaming failed"):
        write(case, destination)
    assert is_exported(destination, RECORD)
    assert siblings(destination) == set()


def stale_name(prefix):
    """A temporary name of a process of this host that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return temporary_name(prefix).replace(f"-{os.getpid()}-", f"-{ended.pid}-")


def test_an_export_that_was_killed_between_two_renames_is_undone(tmp_path, monkeypatch):
    destination, case = exported(tmp_path)
    destination.rename(tmp_path / stale_name(".export.old"))
    other = [tmp_path / stale_name(".export2.new"), tmp_path / temporary_name(".export.new")]
    for folder in other:
        folder.mkdir()
    monkeypatch.setattr(directory, "write_safetensors", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(case, destination)
    assert is_exported(destination, RECORD)
    assert siblings(destination) == {folder.name for folder in other}


def test_an_export_that_is_not_whole_is_not_exported(tmp_path):
    destination, _ = exported(tmp_path, max_shard_size="20KB")
    assert is_exported(destination, RECORD)
    assert not is_exported(destination, {**RECORD, "weights_digest": "other"})
    assert not is_exported(destination, {**RECORD, "more": None})
    assert not is_exported(tmp_path / "nowhere", RECORD)
    for file in sorted(destination.iterdir()):
        content = file.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            file.write_bytes(changed)
            assert not is_exported(destination, RECORD), (file.name, position)
        file.write_bytes(content[:-2])
        assert not is_exported(destination, RECORD), file.name
        file.unlink()
        assert not is_exported(destination, RECORD), file.name
        file.write_bytes(content)
        assert is_exported(destination, RECORD)
    save_file({"lm_head.weight": torch.zeros(272, 32)}, destination / "model.safetensors")
    assert not is_exported(destination, RECORD)


@pytest.mark.parametrize("mask", [1, 0x20])
def test_every_byte_of_the_record_matters(mask, tmp_path):
    """The file with the digests has no digest itself: what a flipped byte makes of it must never pass."""
    destination, _ = exported(tmp_path)
    file = destination / "surgeon.json"
    content = file.read_bytes()
    passed = []
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= mask
        file.write_bytes(changed)
        if is_exported(destination, RECORD) and json.loads(file.read_bytes()) != json.loads(content):
            passed.append(position)
    assert passed == []


@pytest.mark.parametrize("content", ["[]", "null", '{"files": 3}', '{"files": {"config.json": 1}}', ""])
def test_a_record_of_another_form_is_not_an_export(content, tmp_path):
    (tmp_path / "surgeon.json").write_text(content)
    assert not is_exported(tmp_path, {})


def test_other_logits_do_not_pass_and_rounding_does():
    expected = torch.randn(2, 20, 272, generator=torch.Generator().manual_seed(0))
    probe, largest = Probe(TOKENS, torch.ones_like(TOKENS)), expected.abs().max()

    def compare(whole, stepwise, dtype=torch.float32):
        return require_same_logits(Path("export"), {"whole": whole, "stepwise": stepwise}, probe, expected, dtype)

    assert compare(expected, expected) == 0.0
    assert 0 < compare(expected, expected + 5e-5 * largest) < 1e-4
    with pytest.raises(ExportError, match=r"export loads .* other logits than .* 2.00e-04, allowed 0.0001"):
        compare(expected + 2e-4 * largest, expected)
    with pytest.raises(ExportError, match=r"other logits with the key/value cache than .* 2.00e-04, allowed 0.0001"):
        compare(expected, expected + 2e-4 * largest)
    with pytest.raises(ExportError, match=r"relative difference nan"):
        compare(expected * torch.nan, expected)
    with pytest.raises(ExportError, match=r"relative difference inf"):
        compare(expected[..., :5], expected)
    assert 0 < compare(expected, expected + 0.01 * largest, torch.bfloat16) < 5e-2
    with pytest.raises(ExportError, match=r"allowed 0.05"):
        compare(expected, expected + 0.2 * largest, torch.bfloat16)


def greedy(model, prompt, n_tokens):
    """The most likely token, one at a time, without a cache, until the end of text."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(n_tokens):
            following = model(ids, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if int(following) == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True), ids.shape[1] - start


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma"])
def test_a_prompt_is_continued_greedily(family, tmp_path):
    model = load_stock(make_tiny(family, tmp_path / "model", seed=3))
    expected, n_tokens = greedy(model, PROMPT, N_NEW)
    assert n_tokens > 3
    assert continue_prompt(model, byte_tokenizer(), PROMPT, N_NEW) == expected
    torch.manual_seed(5)
    assert continue_prompt(model, byte_tokenizer(), PROMPT, N_NEW) == expected
    assert continue_prompt(model, byte_tokenizer(), PROMPT, 3) == greedy(model, PROMPT, 3)[0]


def test_the_generation_settings_of_a_model_do_not_change_the_text(tmp_path):
    """A checkpoint may ask for sampling, beams or penalties; a model held block-wise has read none of it."""
    path = make_tiny("llama", tmp_path / "model", seed=3)
    settings = {"do_sample": True, "temperature": 5.0, "num_beams": 3, "repetition_penalty": 3.0, "min_new_tokens": 9}
    GenerationConfig(**settings, no_repeat_ngram_size=1, max_length=20).save_pretrained(path)
    model = load_stock(path)
    assert model.generation_config.repetition_penalty == 3.0
    expected = greedy(model, PROMPT, N_NEW)[0]
    assert continue_prompt(model, byte_tokenizer(), PROMPT, N_NEW) == expected
    assert model.generation_config.repetition_penalty == 3.0
    with case_of(opened(path), lambda *_: None).in_memory() as block_wise:
        assert continue_prompt(block_wise, byte_tokenizer(), PROMPT, N_NEW) == expected


def test_a_text_ends_where_the_model_ends_it(tmp_path):
    path = make_tiny("llama", tmp_path / "model", seed=3)
    tokenizer, ending = byte_tokenizer(), byte_tokenizer().eos_token_id
    plain = load_stock(path)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        third = int(plain.generate(**ids, max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, -1])
    rows = list(range(272))
    rows[ending], rows[third] = third, ending
    rewrite(path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["lm_head.weight"][rows].clone()}))
    expected, n_tokens = greedy(load_stock(path), PROMPT, N_NEW)
    assert n_tokens <= 3
    assert continue_prompt(load_stock(path), tokenizer, PROMPT, N_NEW) == expected


def test_a_check_that_fails_leaves_the_export_before(tmp_path):
    destination, _ = exported(tmp_path)
    before = logits(load_stock(destination))
    checkpoint = opened(tmp_path / "model")
    seen = []

    def refuse(folder):
        seen.append(load_stock(folder))
        raise ExportError("not the same")

    other = pruned_model(checkpoint, seed=5)
    with pytest.raises(ExportError, match="not the same"):
        write(other, destination, record={"version": 7}, check=refuse)
    assert not torch.equal(logits(seen[0]), before)
    assert torch.equal(logits(load_stock(destination)), before)
    assert is_exported(destination, RECORD)
    assert siblings(destination) == set()
