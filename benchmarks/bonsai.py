"""Bonsai's sub-models against bare forward passes of the same model on the same tokens, and the memory of both.

Usage: python -m benchmarks.bonsai PROJECT [--sub-models 12] [--sequences 8] [--length 128] [--skip-memory]
SmolLM2-135M, calibration on the text of the parameters' defaults.

Speed: one process holds both; a sub-model (a task with everything that belongs to it: draw, hooks, loss, commit) and a
bare forward pass (the model called on the same batches, logits dropped) take turns, so that a machine that is busy is
so for both. Medians. Memory: each side in a process of its own, peak resident.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from flows.bonsai import BonsaiShot
from flows.engine import InlineEngine
from flows.params import load_params
from flows.params_bonsai import BonsaiParams
from flows.session import Session
from flows.workspace import Workspace
from surgeon.passes.loss import next_token_loss
from surgeon.peak import process_peak_gib
from tasks.bonsai import prior_task, sub_model_request, sub_model_task
from tasks.bonsai_round import close_round, opened_round
from tasks.weights import open_shrunk


def open_round(project: Path, arguments: argparse.Namespace) -> BonsaiShot:
    """The first round of a run."""
    given = [
        "run.engine=inline", "prune.method=bonsai", "prune.bonsai.sub_models=64",
        f"calibrate.sequences={arguments.sequences}", f"calibrate.length={arguments.length}",
    ]  # fmt: skip
    session = Session(load_params(None, given), Workspace(project.resolve()), InlineEngine())
    return BonsaiShot(session, session.dense, session.calibration(), 1, 0.05, BonsaiParams(sub_models=10))


def forward(model: nn.Module, inputs: list[torch.Tensor], *, with_loss: bool) -> float:
    """Seconds of a bare forward pass over all batches."""
    begun = time.perf_counter()
    with torch.no_grad():
        for ids in inputs:
            logits = model(input_ids=ids, use_cache=False).logits
            if with_loss:
                float(next_token_loss(logits, ids))
            del logits
    return time.perf_counter() - begun


def speed(shot: BonsaiShot, n: int) -> dict[str, float]:
    """Median seconds of a sub-model, of a forward pass, and of one with its loss."""
    context, work, store = shot.context, shot.work, shot.context.store.open()
    prior = prior_task(context, work).value
    times: dict[str, list[float]] = {"sub-model": [], "forward": [], "forward with loss": [], "first attention": []}
    with opened_round(context, work) as opened:
        forward(opened.model, opened.inputs, with_loss=True)
    for index in range(n):
        if store.lookup(sub_model_request(context, work, prior, index).key(context)) is not None:
            sys.exit("The project has these sub-models already; give an empty directory.")
        begun = time.perf_counter()
        sub_model_task(context, work, prior, index)
        times["sub-model"].append(time.perf_counter() - begun)
        with opened_round(context, work) as opened:
            times["forward"].append(forward(opened.model, opened.inputs, with_loss=False))
            times["forward with loss"].append(forward(opened.model, opened.inputs, with_loss=True))
            times["first attention"].append(before_first_mask(opened.model, opened.parts[0].linear, opened.inputs))
    close_round()
    return {name: statistics.median(values) for name, values in times.items()}


class _Masked(Exception):  # noqa: N818 - control flow
    """The first linear whose input is masked was reached."""


def before_first_mask(model: nn.Module, linear: nn.Module, inputs: list[torch.Tensor]) -> float:
    """Seconds of what all sub-models have in common: embedding, and the first block up to its first mask."""

    def stop(*_: object) -> None:
        raise _Masked

    handle = linear.register_forward_pre_hook(stop)
    begun = time.perf_counter()
    with torch.no_grad():
        for ids in inputs:
            try:
                model(input_ids=ids, use_cache=False)
            except _Masked:
                continue
    handle.remove()
    return time.perf_counter() - begun


def memory(shot: BonsaiShot, side: str) -> float:
    """Peak resident memory of this process, GiB, after a side has done its work."""
    context, work = shot.context, shot.work
    if side == "round":
        prior = prior_task(context, work).value
        for index in range(2):
            sub_model_task(context, work, prior, index)
        return process_peak_gib()
    model = open_shrunk(context, shot.state).model
    tokens = torch.from_numpy(work.tokens(context))
    for ids in tokens.split(context.batch_size):
        forward(model, [ids], with_loss=True)
    return process_peak_gib()


def main() -> None:
    """Measures both and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, help="an empty directory for results")
    parser.add_argument("--sub-models", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--side", choices=("round", "inference"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shot = open_round(arguments.project / (arguments.side or "speed"), arguments)
    if arguments.side:
        print(json.dumps({"gib": memory(shot, arguments.side)}))
        return
    found = speed(shot, arguments.sub_models)
    print("| what | seconds (median) | per second | of bare forward passes |\n|---|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.3f} | {1 / seconds:.2f} | {found['forward'] / seconds:.2f} |")
    if arguments.skip_memory:
        return
    print("\n| peak resident memory, GiB | |\n|---|---|")
    for side in ("inference", "round"):
        command = [sys.executable, "-m", "benchmarks.bonsai", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {side} | {json.loads(done.stdout.splitlines()[-1])['gib']:.2f} |")


if __name__ == "__main__":
    main()
