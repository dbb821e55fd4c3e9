"""How far recovery training is from its floor: the loop against forward, backward and AdamW alone, on SmolLM2-135M.

Usage: python -m benchmarks.training [--rounds 5] [--rows 4] [--length 128]

Both train all weights of the same model in float32 on the same rows, step by step in turn; the other loop has neither
clipping nor masks, schedule, checks or records, and the same fused AdamW. Prints medians of tokens per second and their
ratio. Times are those of a noisy machine; the ratio is what counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flows.params import load_params
from flows.workspace import Workspace
from surgeon.choices import Recovery, RecoveryPreset
from surgeon.models import resolve_model
from surgeon.passes.loss import next_token_loss
from surgeon.recovery.objective import NextTokens
from surgeon.recovery.packing import step_rows
from surgeon.recovery.settings import RecoverySettings, preset_settings
from surgeon.recovery.training import Trainer, trainable_parameters
from surgeon.text.tokenizers import TokenArray


def load() -> PreTrainedModel:
    """The default model in float32, in evaluation mode."""
    checkpoint = resolve_model(load_params(None).model.source, Workspace(Path()).models)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    model.train(mode=False)
    return model


def bare_step(model: PreTrainedModel, rows: TokenArray, settings: RecoverySettings) -> Callable[[int], None]:
    """One step of the plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)

    def step(number: int) -> None:
        input_ids = torch.from_numpy(rows[step_rows(len(rows), number, settings)])
        optimizer.zero_grad()
        logits = model(input_ids, use_cache=False).logits
        (next_token_loss(logits, input_ids) / input_ids[:, 1:].numel()).backward()
        optimizer.step()

    return step


def main() -> None:
    """Takes steps of both loops in turn and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    tokens = given.rows * given.length
    settings = preset_settings(
        Recovery.FULL,
        RecoveryPreset.SMOKE,
        micro_batch=given.rows,
        seed=0,
        tokens=tokens * (given.rounds + 1),
        length=given.length,
        batch_tokens=tokens,
    )
    rows = np.random.default_rng(0).integers(0, 49_000, (64, given.length))
    ours, other = load(), load()
    trainer = Trainer(NextTokens(ours), trainable_parameters(ours), {}, settings, rows)
    bare = bare_step(other, rows, settings)
    seconds: dict[str, list[float]] = {"recovery": [], "bare loop": []}
    for number in range(given.rounds + 1):
        for name, step in (("recovery", lambda: trainer.run(1)), ("bare loop", lambda n=number: bare(n))):
            start = time.perf_counter()
            step()
            if number:  # the first makes the moments
                seconds[name].append(time.perf_counter() - start)
    print("| loop | tokens/s, median (range) |\n|---|---|")
    for name, times in seconds.items():
        speeds = [tokens / each for each in times]
        print(f"| {name} | {statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f}) |")
    ratios = [bare_s / ours_s for ours_s, bare_s in zip(*seconds.values(), strict=True)]
    print(f"\nratio of steps side by side: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
