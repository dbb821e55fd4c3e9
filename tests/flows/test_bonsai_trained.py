"""On a language model that has learnt something, running sub-models is worth more than the prior alone."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, make_tiny
from transformers import AutoModelForCausalLM

from surgeon.models.quiet import quiet_transformers
from tests.flows.bonsai import rounds
from tests.flows.sessions import Runs

pytestmark = [pytest.mark.usefixtures("in_process"), pytest.mark.slow]


def train(directory: Path, text: str, steps: int = 300) -> Path:
    """A Llama of two blocks and width 64 that has read some documentation."""
    make_tiny(
        "llama-gqa-tied", directory, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    tokens = torch.tensor(byte_tokenizer()(text)["input_ids"])
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (steps - step) / 100)
        starts = torch.randint(len(tokens) - 64, (16,), generator=generator)
        ids = torch.stack([tokens[s : s + 64] for s in starts.tolist()])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    return directory


def perplexity_at_30_percent(runs: Runs, sub_models: int) -> float:
    """By the published choice with sub-models, global, and without, in each sub-layer."""
    session = runs.session(
        {
            "method": "bonsai",
            "structure": "units",
            "sparsity": 0.3,
            "widths": "free",
            "multiple": 1,
            "heads": True,
            "allocation": "global" if sub_models else "per-layer",
        }
    )
    shots = rounds(session, 3, sub_models=sub_models)
    assert shots[-1].record["sparsity"] >= 0.3
    return shots[-1].evaluation.attributes["perplexity"]


def test_sub_models_are_worth_more_than_the_prior(tmp_path: Path) -> None:
    text = "\n".join(pydoc_data.topics.topics.values())
    third = len(text) // 3
    model = train(tmp_path / "model", text[:third])
    for name, part in (("calibration", text[third : 2 * third]), ("evaluation", text[2 * third :])):
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
    runs = Runs(
        {
            "model": {"source": str(model)},
            "calibrate": {"text": {"source": str(tmp_path / "calibration.txt")}, "sequences": 16, "length": 64},
            "evaluate": {"text": {"source": str(tmp_path / "evaluation.txt")}, "windows": 32, "length": 64},
            "run": {"engine": "inline", "batch_size": 16, "blocks_per_group": 2, "keep": "all"},
        },
        tmp_path / "project",
    )
    by_regression, by_prior = (perplexity_at_30_percent(runs, n) for n in (64, 0))
    assert by_regression < 0.95 * by_prior
