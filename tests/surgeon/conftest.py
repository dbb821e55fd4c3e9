"""Checkpoints of tiny models, shared by all tests of the library."""

import pytest
import torch
from tiny import POSITIONS, VOCABULARY, byte_tokenizer, make_tiny
from transformers import AutoModelForCausalLM, FalconConfig

from surgeon.models import resolve_model
from surgeon.models.quiet import quiet_transformers


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Family → checkpoint of its tiny model, made once for all tests: they only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    made = {}

    def get(family):
        if family not in made:
            make = make_falcon if family == "falcon" else make_tiny
            path = make(family, folder / family)
            made[family] = resolve_model(str(path), folder / "cache")
        return made[family]

    return get


def make_falcon(_family, path):
    """A family without a description; its blocks return a tuple, not hidden states alone."""
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_hidden_size=64,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return path
