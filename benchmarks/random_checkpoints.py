"""Random checkpoints with the widths of published models and any number of blocks, written a block at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

from tests.tiny import byte_tokenizer

_SPREAD = 0.02
"""Standard deviation of the weights, as models are initialised."""
_POSITIONS = 4096


@dataclass(frozen=True)
class Shape:
    """Widths of a published model.

    Attributes:
        family: "opt" or "llama".
        width: of the hidden states.
        inner: neurons of an MLP.
        heads: of queries.
        groups: of keys and values.
        vocabulary: rows of the embedding.
        blocks: of the published model.
        tied: whether the head is the embedding.
    """

    family: str
    width: int
    inner: int
    heads: int
    groups: int
    vocabulary: int
    blocks: int
    tied: bool

    def config(self, blocks: int | None = None) -> PreTrainedConfig:
        """Configuration of a model of these widths, with as many blocks as the published one unless told."""
        common = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": blocks or self.blocks,
            "num_attention_heads": self.heads,
            "max_position_embeddings": _POSITIONS,
            "tie_word_embeddings": self.tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.family == "opt":
            return OPTConfig(**common, ffn_dim=self.inner, word_embed_proj_dim=self.width)
        return LlamaConfig(**common, intermediate_size=self.inner, num_key_value_heads=self.groups)


SHAPES = {
    "opt-125m": Shape("opt", 768, 3072, 12, 12, 50272, 12, tied=True),
    "opt-1.3b": Shape("opt", 2048, 8192, 32, 32, 50272, 24, tied=True),
    "llama-2-7b": Shape("llama", 4096, 11008, 32, 32, 32000, 32, tied=False),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 8, 128256, 32, tied=False),
    "llama-2-13b": Shape("llama", 5120, 13824, 40, 40, 32000, 40, tied=False),
    "llama-2-70b": Shape("llama", 8192, 28672, 64, 8, 32000, 80, tied=False),
    "small": Shape("llama", 512, 1536, 8, 8, 272, 8, tied=True),
}
"""By name; "small" is for the tests: blocks are most of it."""


def save_description(shape: Shape, directory: Path, blocks: int | None = None) -> PreTrainedConfig:
    """Writes configuration and tokenizer, no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    config = shape.config(blocks)
    config.architectures = ["OPTForCausalLM" if shape.family == "opt" else "LlamaForCausalLM"]
    config.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = _POSITIONS
    tokenizer.save_pretrained(directory)
    return config


def make_checkpoint(shape: Shape, directory: Path, blocks: int, seed: int = 0) -> Path:
    """Writes a random checkpoint in bfloat16, one file for each block and one for the rest; never holds more.

    Args:
        shape: widths.
        directory: of the checkpoint; left alone if it is complete.
        blocks: how many.
        seed: of the weights.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return directory
    config = save_description(shape, directory, blocks)
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: dict[str, list[str]] = {}
    for name in skeleton.state_dict():
        if shape.tied and name == "lm_head.weight":
            continue
        parts = name.split(".layers.")
        number = int(parts[1].split(".")[0]) + 1 if len(parts) == 2 else 0
        files.setdefault(f"model-{number:05d}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    for file, names in files.items():
        tensors = {name: _tensor(name, shapes[name], generator) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors
    total = sum(2 * shapes[name].numel() for names in files.values() for name in names)
    weight_map = {name: file for file, names in files.items() for name in names}
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), encoding="utf-8")
    return directory


def _tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, _SPREAD, generator=generator)
