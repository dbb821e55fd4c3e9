"""Tiny random models of the real transformers classes, with a tokenizer, saved as checkpoints for tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from surgeon.models.quiet import quiet_transformers

FAMILIES = ("opt", "llama", "llama-gqa-tied", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "phi")
VOCABULARY = 272
POSITIONS = 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_SETTINGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "opt": (OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama": (LlamaConfig, {"intermediate_size": 48, "num_key_value_heads": 4}),
    "llama-gqa-tied": (LlamaConfig, {"intermediate_size": 48, "tie_word_embeddings": True, **_GROUPED}),
    "mistral": (MistralConfig, {"intermediate_size": 48, "sliding_window": None, **_GROUPED}),
    "qwen2": (Qwen2Config, {"intermediate_size": 48, **_GROUPED}),
    "qwen3": (Qwen3Config, {"intermediate_size": 48, "head_dim": 16, **_GROUPED}),
    "gemma": (GemmaConfig, {"intermediate_size": 64, "head_dim": 16, **_GROUPED}),
    "gpt_neox": (GPTNeoXConfig, {"intermediate_size": 64}),
    "phi": (PhiConfig, {"intermediate_size": 64, **_GROUPED}),
}


def make_tiny(family: str, directory: Path, seed: int = 0, *, max_shard_size: str = "1GB", **changes: object) -> Path:
    """Saves a tiny random model with its tokenizer and returns the directory.

    It has 3 blocks of width 32, 4 query heads and a vocabulary of 272; weights are large enough that logits vary, norms
    are not all ones and biases are not zero. The same arguments give the same weights.

    Args:
        family: One of `FAMILIES`.
        directory: Where to save; it is created.
        seed: Seed of the weights.
        max_shard_size: Largest file, such as "20KB"; small values give a sharded checkpoint.
        changes: Values of the configuration to change.
    """
    config_class, settings = _SETTINGS[family]
    config = config_class(**{**_COMMON, **settings, **changes})
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model, seed)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        byte_tokenizer().save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer: 4 special tokens, 256 bytes and a few merges; any text can be tokenised."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("o", "n"), ("a", "n")]
    symbols = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [left + right for left, right in merges]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
    )


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
