"""Times of one model: a forward pass over a prompt, then new tokens one by one with the key/value cache."""

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgeon.benchmarking.clock import wait_for


@dataclass(frozen=True)
class Shape:
    """What is computed: sequences at a time, tokens of each prompt, tokens that follow one by one."""

    batch_size: int
    prompt: int
    new_tokens: int


@dataclass(frozen=True)
class Seconds:
    """What it took.

    Attributes:
        prefill: seconds of the forward pass over all prompts.
        decode: seconds of all steps of one token for each sequence.
        cache_bytes_per_token: key/value cache of one token of one sequence; None where it cannot be told.
    """

    prefill: float
    decode: float
    cache_bytes_per_token: int | None


def random_tokens(shape: Shape, n_vocabulary: int, seed: int) -> Tensor:
    """Token ids `[batch_size, prompt + new_tokens]`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n_vocabulary, (shape.batch_size, shape.prompt + shape.new_tokens), generator=generator)


def keeps_last_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward can leave the logits of all positions but the last out."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def time_once(model: PreTrainedModel, tokens: Tensor, shape: Shape) -> Seconds:
    """Runs the prompt, then the new tokens, which are given and not drawn: what a model says stops nothing.

    Args:
        model: loaded.
        tokens: `[batch_size, prompt + new_tokens]` int64 on the model's device.
        shape: how many of them are the prompt.
    """
    last = {"logits_to_keep": 1} if keeps_last_logits(model) else {}
    wait_for(tokens.device.type)
    start = time.perf_counter()
    cache = model(input_ids=tokens[:, : shape.prompt], use_cache=True, **last).past_key_values
    wait_for(tokens.device.type)
    between = time.perf_counter()
    cache_bytes = _cache_bytes(cache, shape.batch_size * shape.prompt)
    begun = time.perf_counter()
    for position in range(shape.prompt, shape.prompt + shape.new_tokens):
        step = tokens[:, position : position + 1]
        cache = model(input_ids=step, past_key_values=cache, use_cache=True, **last).past_key_values
    wait_for(tokens.device.type)
    return Seconds(between - start, time.perf_counter() - begun, cache_bytes)


def _cache_bytes(cache: Any, n_tokens: int) -> int | None:
    parts = [part for layer in getattr(cache, "layers", ()) for part in (layer.keys, layer.values)]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        return None
    total: int = sum(part.numel() * part.element_size() for part in parts)
    return total // n_tokens
