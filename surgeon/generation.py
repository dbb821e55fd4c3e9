"""Continuing a prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def continue_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int) -> str:
    """Continues a prompt greedily, so the same model always gives the same text.

    Args:
        model: with all weights loaded.
        tokenizer: the model's.
        prompt: text to continue.
        n_tokens: at most so many new tokens.

    Returns:
        The new text, without the prompt.
    """
    encoded: Any = tokenizer(prompt, return_tensors="pt").to(model.device)
    ending: Any = tokenizer.eos_token_id
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=n_tokens, do_sample=False, use_cache=True, eos_token_id=ending, pad_token_id=ending or 0
    )
    generate: Any = model.generate
    with _without_settings(model):
        output = generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=config)
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Sets aside the model's own generation settings (penalties, beams), which fill in what a call leaves open."""
    kept: Any = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = kept
