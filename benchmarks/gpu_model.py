"""Random checkpoints with the widths of real models, made on the device and written block by block; random text."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import byte_tokenizer

_SCALE = 0.02


@dataclass(frozen=True)
class Widths:
    """Shape of a Llama."""

    hidden: int
    mlp: int
    heads: int
    vocabulary: int


WIDTHS = {"llama-2-7b": Widths(4096, 11008, 32, 32_000), "tiny": Widths(64, 176, 4, 300)}


def make_checkpoint(directory: Path, widths: Widths, n_blocks: int, dtype: torch.dtype, device: str) -> Path:
    """Saves a random Llama with the byte-level tokenizer of the tests; nothing if it is there.

    Args:
        directory: where; one file for what is outside the blocks, and one for each block.
        widths: of the model.
        n_blocks: decoder blocks.
        dtype: of the files.
        device: where numbers are drawn, which is quick on a GPU.
    """
    if (directory / "model.safetensors.index.json").is_file():
        return directory
    config = LlamaConfig(
        hidden_size=widths.hidden,
        intermediate_size=widths.mlp,
        num_hidden_layers=n_blocks,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.heads,
        vocab_size=widths.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    weight_map = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        weight_map[name] = f"model-{part}.safetensors"
        files.setdefault(weight_map[name], {})
    for file in files:
        tensors = {}
        for name in (name for name, where in weight_map.items() if where == file):
            drawn = torch.randn(shapes[name], generator=generator, device=device, dtype=torch.float32)
            value = 1.0 + 0.1 * drawn if len(shapes[name]) == 1 else _SCALE * drawn
            tensors[name] = value.to(dtype).cpu()
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_words(path: Path, seed: int, n_words: int) -> Path:
    """A text of random words, the same for the same seed."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(300)]
    path.write_text(" ".join(draw.choices(words, k=n_words)) + "\n")
    return path
