"""How far the passes are from their floor, and how much of a run is not work: SmolLM2-135M, the default run.

Usage: python -m benchmarks.speed PROJECT [--rounds 5]

1. Curvature pass against a bare forward and backward to activations of the stock model over the same batches,
   alternating, medians of several rounds. Beside them the products that form the factors, alone.
2. A fresh default run with the inline engine: seconds inside the library (passes, solves, evaluation, export) and the
   rest (orchestration, keys, store, reading and writing).

Times are those of a noisy machine; the ratios are what counts.
"""

import argparse
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flows.engine import InlineEngine
from flows.params import load_params
from flows.session import Session
from flows.stages import run_all
from flows.workspace import Workspace
from surgeon.curvature.gram import add_gram
from surgeon.curvature.kronecker_factors import InputObserver, OutputObserver
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import GroupPass, TokenArray, curvature_group, observed_block
from surgeon.passes.loss import next_token_loss
from tasks.stage import read_arrays
from tasks.units import output_linears

_LIBRARY = {
    "curvature": ("tasks.measuring.curvature_group", "tasks.measuring.forward_group"),
    "solves": (
        "tasks.costs.live_linear",
        "tasks.costs.structure_costs",
        "tasks.costs.weight_costs",
        "tasks.mask.allocate",
        "tasks.mask.select_weights",
        "tasks.units.live_linear",
        "tasks.units.eliminate",
        "tasks.units.allocate_units",
        "tasks.update.live_linear",
        "tasks.update.update_structures",
        "tasks.update.update_weights",
        "tasks.update.update_sequentially",
    ),
    "evaluation": ("tasks.evaluation.evaluate_perplexity", "tasks.evaluation.continue_prompt"),
    "export": ("tasks.export.export_checkpoint", "tasks.export.require_loads_back"),
}


def default_session(project: Path) -> Session:
    """A session with the default parameters and no server; the exported model's speed is another benchmark."""
    return Session(
        load_params(None, ["run.engine=inline", "benchmark.rounds=0"]), Workspace(project.resolve()), InlineEngine()
    )


def bare_pass(model: PreTrainedModel, tokens: TokenArray, batch_size: int) -> None:
    """Forward and backward to activations, nothing else: the floor."""
    for start in range(0, len(tokens), batch_size):
        ids = torch.from_numpy(tokens[start : start + batch_size])
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = next_token_loss(model(inputs_embeds=hidden, use_cache=False).logits, ids)
        torch.autograd.grad(loss, hidden)


def kfac_pass(
    model: BlockwiseModel, tokens: TokenArray, batch_size: int, linears: tuple[str, ...] | None = None
) -> None:
    """The pass for the factors of K-FAC of all blocks, of all linears or of those named."""
    blocks = range(model.n_blocks)
    seen = {index: observed_block(model, index, linears) for index in blocks}
    observers = {index: (InputObserver(block), OutputObserver(block)) for index, block in seen.items()}
    curvature_group(model, GroupPass(tokens, blocks, batch_size), observers)
    for inputs, outputs in observers.values():
        inputs.result()
        outputs.result()


def products(shapes: list[tuple[int, int]], n_tokens: int) -> None:
    """The triangular products of all factors over one batch."""
    for n, repeats in shapes:
        x = torch.randn(n_tokens, n)
        total = torch.zeros(n, n)
        for _ in range(repeats):
            add_gram(total, x)


def seconds(body: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def passes(session: Session, rounds: int) -> None:
    """Measures the curvature pass against its floor."""
    context = session.context
    tokens = read_arrays(context, session.calibration().key)["tokens"]
    stock = AutoModelForCausalLM.from_pretrained(session.checkpoint.path, dtype=torch.float32)
    stock.requires_grad_(False)
    ours = BlockwiseModel(session.checkpoint)
    batch = context.batch_size
    groups = range(ours.n_blocks)
    squares: dict[int, int] = defaultdict(int)
    for index in groups:
        for linear in ours.linears(index).values():
            squares[linear.out_features] += 1
        for group in ours.shared(index):
            squares[ours.linears(index)[group[0]].in_features] += 1
    n_batches = -(-len(tokens) // batch)
    kinds: dict[str, Callable[[], Any]] = {
        "bare forward + backward": lambda: bare_pass(stock, tokens, batch),
        "curvature pass": lambda: kfac_pass(ours, tokens, batch),
        "curvature pass for units": lambda: kfac_pass(ours, tokens, batch, output_linears(session.model)),
        "triangular products alone": lambda: [
            products(list(squares.items()), batch * tokens.shape[1]) for _ in range(n_batches)
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with ours.loaded(groups):
        for _ in range(rounds):
            for name, body in kinds.items():
                times[name].append(seconds(body))
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = medians["bare forward + backward"]
    ratios = {
        name: [c / b for c, b in zip(times[name], times["bare forward + backward"], strict=True)]
        for name in ("curvature pass", "curvature pass for units")
    }
    print(f"{tokens.size} tokens, batches of {batch} x {tokens.shape[1]}, {torch.get_num_threads()} threads\n")
    print("| | seconds (median) | of the floor |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / floor:.2f} |")
    for name, values in ratios.items():
        rounds_ = ", ".join(f"{value:.2f}" for value in values)
        print(f"\n{name} / floor by round: {rounds_}; median {np.median(values):.2f}")
    print()


@contextmanager
def library_timers() -> Iterator[dict[str, float]]:
    """Sums up the seconds spent in the library functions that the tasks call."""
    spent: dict[str, float] = defaultdict(float)
    patches = []
    for kind, names in _LIBRARY.items():
        for name in names:
            module, attribute = name.rsplit(".", 1)
            original = getattr(__import__(module, fromlist=[attribute]), attribute)

            def timed(*args: Any, _body: Callable[..., Any] = original, _kind: str = kind, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    return _body(*args, **kwargs)
                finally:
                    spent[_kind] += time.perf_counter() - start

            patches.append(patch(name, timed))
    for each in patches:
        each.start()
    try:
        yield spent
    finally:
        for each in patches:
            each.stop()


def whole_run(project: Path) -> None:
    """Measures where a fresh default run spends its time."""
    for part in ("store", "stages", "timings", "export", "run.zarr", "metrics"):
        shutil.rmtree(project / "data" / part, ignore_errors=True)
    session = default_session(project)
    session.check()
    with library_timers() as spent:
        total = seconds(lambda: run_all(session))
    rest = total - sum(spent.values())
    print("| default run, inline | seconds | share |\n|---|---|---|")
    for name, value in [*spent.items(), ("orchestration, keys, store", rest), ("total", total)]:
        print(f"| {name} | {value:.1f} | {value / total:.1%} |")


def main() -> None:
    """Runs both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    passes(default_session(arguments.project), arguments.rounds)
    whole_run(arguments.project)


if __name__ == "__main__":
    main()
