"""One structured shot at the widths of Llama-2-7B on a GPU, against the bare forward and backward passes.

Usage: python -m benchmarks.gpu --check                       what must hold on a GPU (benchmarks/gpu_checks.py)
       python -m benchmarks.gpu [--blocks 8] [--sequences 128] [--batch N] [--structure units]
       python -m benchmarks.gpu --device cpu --widths tiny --sequences 8 --length 64   a trial of the script itself

Random weights and text; no server, no network. Prints a table, and last one line of JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_checks import CHECKS
from benchmarks.gpu_model import WIDTHS, make_checkpoint, write_words
from flows.engine import InlineEngine
from flows.params import load_params
from flows.pool import ThreadPool
from flows.prune import prune
from flows.session import Session
from flows.workspace import Workspace
from surgeon.benchmarking.clock import seconds_of
from surgeon.curvature import gram
from surgeon.curvature.kronecker_factors import InputObserver, OutputObserver
from surgeon.devices import describe_device
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import GroupPass, TokenArray, curvature_group, observed_block
from surgeon.passes.loss import next_token_loss
from surgeon.peak import process_peak_gib
from tasks.stage import read_arrays

GIB = 2**30
PEAK_FLOPS = {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12}
"""Of an H100 SXM, dense, per second (NVIDIA's data sheet)."""
_TOKENS_PER_WORD = 2.5
"""Of random words, at least."""


def main() -> None:
    """Runs what was asked for."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        folder = Path(temporary)
        if arguments.check:
            sys.exit(check(folder, arguments.device))
        result = measure(folder, arguments)
    _table(result)
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--directory", type=Path, default=None, help="where everything goes and is removed again")
    parser.add_argument("--widths", default="llama-2-7b", choices=WIDTHS)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=None, help="sequences at a time; chosen by memory if not given")
    parser.add_argument("--blocks-per-group", type=int, default=None, help="likewise")
    parser.add_argument("--structure", default="units")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32"))
    parser.add_argument("--bare-batches", type=int, default=4, help="batches that the bare pass is timed on")
    parser.add_argument("--workers", type=int, default=1, help="threads for costs and updates of blocks")
    parser.add_argument("-S", dest="more", action="append", default=[], help="more parameters, section.key=value")
    return parser.parse_args()


def check(folder: Path, device: str) -> int:
    """Runs all checks and says how each went; the number of those that failed."""
    failed = 0
    for name, body in CHECKS.items():
        start = time.perf_counter()
        try:
            figures: dict[str, Any] = body(folder, device)
        except Exception as error:
            failed += 1
            figures = {"FAILED": f"{type(error).__name__}: {error}"}
        print(f"{name} ({time.perf_counter() - start:.1f} s)")
        for what, value in figures.items():
            print(f"  {what}: {value:.3g}" if isinstance(value, float) else f"  {what}: {value}")
        sys.stdout.flush()
    print("all hold" if not failed else f"{failed} FAILED")
    return failed


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Makes the checkpoint, measures the parts, and runs the shot."""
    widths, device = WIDTHS[given.widths], given.device
    start = time.perf_counter()
    model = make_checkpoint(folder / "model", widths, given.blocks, getattr(torch, given.dtype), device)
    made_s = time.perf_counter() - start
    session = open_session(folder, model, given)
    context = session.context
    result: dict[str, Any] = {
        "device": describe_device(context.device),
        "torch": torch.__version__,
        "widths": given.widths,
        "blocks": given.blocks,
        "sequences": given.sequences,
        "length": given.length,
        "dtype": context.dtype,
        "structure": given.structure,
        "batch_size": context.batch_size,
        "blocks_per_group": context.blocks_per_group,
        "workers": given.workers,
        "checkpoint_s": made_s,
    }
    tokens = read_arrays(context, session.calibration().key)["tokens"]
    result["grams"] = grams(context.place, sorted({side for shape in session.model.shapes()[0] for side in shape}))
    result["bare_s"], n_batches = bare_pass(session, tokens, given.bare_batches)
    result["observed_s"] = observed_pass(session, tokens, given.bare_batches)
    result["batches"] = n_batches
    flops = pass_flops(session, tokens)
    result["pass_tflop"] = flops / 1e12
    result["bare_of_peak"] = flops / result["bare_s"] / PEAK_FLOPS[context.dtype]
    result |= shot(session)
    curvature_s = result["seconds"].get("curvature", 0.0) + result["seconds"].get("boundary", 0.0)
    result["achieved_of_curvature"] = result["bare_s"] / curvature_s if curvature_s else 0.0
    result["achieved_of_shot"] = result["bare_s"] / result["shot_s"]
    result["shot_of_peak"] = flops / result["shot_s"] / PEAK_FLOPS[context.dtype]
    session.close()
    return result


def open_session(folder: Path, model: Path, given: argparse.Namespace) -> Session:
    """A session on random text that is just long enough."""
    windows = 8
    for name, n in (("calibration", given.sequences), ("evaluation", windows)):
        write_words(folder / f"{name}.txt", len(name), n_words=round(n * given.length / _TOKENS_PER_WORD) + 500)

    def setting(name: str, value: object) -> str:
        return f"{name}={'null' if value is None else value}"

    overrides = [
        *(f"model.source={model}", f"model.dtype={given.dtype}", f"run.precision={given.precision}"),
        *(f"run.device={given.device}", "run.engine=inline", "run.keep=all"),
        setting("run.batch_size", given.batch),
        setting("run.blocks_per_group", given.blocks_per_group),
        f"calibrate.text={{source: {folder / 'calibration.txt'}}}",
        f"evaluate.text={{source: {folder / 'evaluation.txt'}}}",
        *(f"calibrate.sequences={given.sequences}", f"calibrate.length={given.length}"),
        *(f"evaluate.windows={windows}", f"evaluate.length={given.length}"),
        *("prune.shots=1", "prune.sparsity=0.2", f"prune.structure={given.structure}", f"run.workers={given.workers}"),
        *given.more,
    ]
    pool = ThreadPool(given.workers, torch.get_num_threads()) if given.workers > 1 else None
    engine = InlineEngine(pool=pool)
    session = Session(load_params(None, overrides), Workspace((folder / "project").resolve()), engine, print)
    session.check()
    return session


def bare_pass(session: Session, tokens: TokenArray, n_timed: int) -> tuple[float, int]:
    """Seconds of forward and backward to activations over all sequences with stock transformers, and its batches.

    A few batches are timed, and count for all.
    """
    context = session.context
    model = AutoModelForCausalLM.from_pretrained(session.checkpoint.path, dtype=context.model.torch_dtype)
    model = model.to(context.place).requires_grad_(False)

    def run(ids: torch.Tensor) -> None:
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = next_token_loss(model(inputs_embeds=hidden, use_cache=False).logits, ids)
        torch.autograd.grad(loss, hidden)

    timed, n_batches = _timed_batches(session, tokens, n_timed)
    ids = [torch.from_numpy(part).to(context.place) for part in timed]
    run(ids[0])
    seconds = seconds_of(lambda: [run(part) for part in ids], context.device)
    return seconds / sum(map(len, timed)) * len(tokens), n_batches


def observed_pass(session: Session, tokens: TokenArray, n_timed: int) -> float:
    """Seconds of the same passes block by block with the observers of a shot, nothing stored; all blocks loaded."""
    context = session.context
    model = BlockwiseModel(
        session.checkpoint, dtype=context.model.torch_dtype, device=context.place, precision=context.precision
    )
    blocks = range(model.n_blocks)
    timed, _ = _timed_batches(session, tokens, n_timed)

    def run(sequences: list[TokenArray]) -> None:
        seen = {index: observed_block(model, index, session.measured_linears) for index in blocks}
        observers = {index: (InputObserver(block), OutputObserver(block)) for index, block in seen.items()}
        for part in sequences:
            curvature_group(model, GroupPass(part, blocks, context.batch_size), observers)

    with model.loaded(blocks):
        run(timed[:1])
        seconds = seconds_of(lambda: run(timed), context.device)
    return seconds / sum(map(len, timed)) * len(tokens)


def _timed_batches(session: Session, tokens: TokenArray, n_timed: int) -> tuple[list[TokenArray], int]:
    batch = session.context.batch_size
    parts = [tokens[start : start + batch] for start in range(0, len(tokens), batch)]
    return parts[:n_timed], len(parts)


def grams(device: str, sides: list[int]) -> dict[str, dict[str, float]]:
    """Seconds of a sum of outer products over 16,384 tokens by side and width of panel, bfloat16 on a GPU."""
    on_gpu = device != "cpu"
    n_tokens, found = (16_384 if on_gpu else 64), {}
    for side in sides:
        x = torch.randn(n_tokens, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
        total = torch.zeros(side, side, device=device)
        times = {}
        for width in (512, 1024, 2048, 4096, side):
            body = _gram_of_width(total, x, width)
            body()
            times[str(width)] = seconds_of(lambda body=body: [body() for _ in range(3)], device.split(":")[0]) / 3
        found[str(side)] = times
    return found


def _gram_of_width(total: torch.Tensor, x: torch.Tensor, width: int) -> Callable[[], None]:
    def run() -> None:
        for start in range(0, len(total), width):
            stop = min(start + width, len(total))
            gram.add_product(total[start:stop, :stop], x[:, start:stop], x[:, :stop])

    return run


def pass_flops(session: Session, tokens: TokenArray) -> float:
    """Floating-point operations of forward and backward to activations: linears and head twice, causal attention."""
    model = session.model
    n, length = tokens.size, tokens.shape[1]
    weights = model.n_weights + model.n_vocabulary * model.width
    attention = model.n_blocks * model.width * length  # of a token, forward: two products over half the positions
    return float(4 * weights * n + 3 * 2 * attention * n)


def shot(session: Session) -> dict[str, Any]:
    """Runs the shot and says what it took."""
    if session.context.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.context.place)
    before = session.engine.tally.seconds.copy()
    start = time.perf_counter()
    (done,) = session.healed(lambda: prune(session))
    seconds = time.perf_counter() - start
    store = session.store
    written = {reference.key for reference in (*done.references.values(), *done.passed_on)}
    n_bytes = sum(store.size_bytes(key) for key in written)
    kinds = {kind: spent for kind, spent in session.engine.tally.seconds.items() if kind not in before}
    gpu = torch.cuda.max_memory_allocated(session.context.place) / GIB if session.context.device == "cuda" else 0.0
    return {
        "shot_s": seconds,
        "seconds": kinds,
        "sparsity": done.record["sparsity"],
        "perplexity": done.evaluation.attributes["perplexity"],
        "written_gib": n_bytes / GIB,
        "written_gib_per_s": n_bytes / GIB / seconds,
        "peak_gpu_gib": gpu,
        "peak_host_gib": process_peak_gib(),
        "batch_size_used": session.context.batch_size,
        "weights_digest": done.state.digest,
    }


def _table(result: dict[str, Any]) -> None:
    print("| | |\n|---|---|")
    for name, value in result.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                shown = {k: f"{v:.4f}" for k, v in number.items()} if isinstance(number, dict) else f"{number:.2f}"
                print(f"| {name}: {inner} | {shown} |")
        else:
            print(f"| {name} | {value:.3f} |" if isinstance(value, float) else f"| {name} | {value} |")


if __name__ == "__main__":
    main()
