"""What must hold on a GPU, as plain functions: used by tests/gpu and by `python -m benchmarks.gpu --check`.

Each makes runs on a tiny random model and returns what it measured; an AssertionError says what does not hold. The
reference is the same run on the CPU in float32. On a machine without a GPU they run with `device="cpu"`, where some say
less.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_model import write_words
from flows.engine import InlineEngine
from flows.params import load_params
from flows.prune import prune
from flows.session import Session
from flows.workspace import Workspace
from surgeon.curvature.gram import add_gram, mirror_lower
from surgeon.store import SymmetricMatrix
from surgeon.transfer import packed_lower, unpacked_lower
from tasks.evaluation import evaluation_task
from tests.tiny import make_tiny

Array = NDArray[Any]
Figures = dict[str, float]
STRUCTURES = {
    "units": ["prune.structure=units", "prune.widths=free", "prune.multiple=1", "prune.sparsity=0.3"],
    "rows and columns, Newton": ["prune.structure=rows-and-columns", "prune.correction=newton", "prune.sparsity=0.3"],
    "weights": ["prune.structure=weights", "prune.sparsity=0.4", "prune.max_iterations=5"],
    "SparseGPT": ["prune.structure=weights", "prune.sparsity=0.4", "prune.method=sparsegpt"],
    "EKFAC": ["prune.structure=rows", "prune.curvature=ekfac", "prune.sparsity=0.2"],
    "Kronecker sum": ["prune.structure=rows", "prune.curvature=kronecker-sum", "prune.sparsity=0.2"],
}
"""Ways to prune that between them run every pass and every solve."""


@dataclass(frozen=True)
class Made:
    """One shot: arrays of every result by label and name, digests by label, perplexity before and after."""

    arrays: Mapping[str, Array]
    digests: Mapping[str, str]
    weights: str
    perplexity: float
    pruned_perplexity: float
    session: Session


def run_shot(folder: Path, device: str, overrides: list[str], name: str = "run") -> Made:
    """One shot on a tiny Llama with grouped heads, in a project of its own."""
    inputs = folder / "inputs"
    if not inputs.is_dir():
        make_tiny("llama-gqa-tied", inputs / "model", hidden_size=64, intermediate_size=160)
        make_tiny("llama", inputs / "wide", vocab_size=20_000)
        write_words(inputs / "calibration.txt", 1, n_words=4000)
        write_words(inputs / "evaluation.txt", 2, n_words=4000)
    shared = [
        *(f"model.source={inputs / 'model'}", f"run.device={device}", "run.engine=inline", "run.keep=all"),
        *(f"calibrate.text.source={inputs / 'calibration.txt'}", f"evaluate.text.source={inputs / 'evaluation.txt'}"),
        *("calibrate.sequences=16", "calibrate.length=64"),
        *("evaluate.windows=8", "evaluate.length=64", "prune.shots=1", "run.batch_size=4"),
    ]
    given = [*shared, *overrides]
    session = Session(load_params(None, given), Workspace((folder / name).resolve()), InlineEngine())
    session.check()
    made = shot_of(session)
    session.close()
    return made


def shot_of(session: Session) -> Made:
    """What a session of one shot makes."""
    perplexity = session.healed(lambda: _evaluate(session))
    (shot,) = session.healed(lambda: prune(session))
    store = session.store
    arrays = {}
    for label, reference in shot.references.items():
        stored = store.open(reference.key)
        arrays |= {f"{label}:{part}": stored.array(part) for part in stored.names()}
    digests = {label: reference.digest for label, reference in shot.references.items()}
    return Made(
        arrays, digests, shot.state.digest, perplexity, float(shot.evaluation.attributes["perplexity"]), session
    )


def _evaluate(session: Session) -> float:
    """Perplexity of the dense model."""
    parts = session.context, session.dense, session.windows, "dense"
    return float(session.engine.task(evaluation_task, *parts, name="dense/evaluation").attributes["perplexity"])


def differences(made: Made, reference: Made) -> Figures:
    """For each kind of result, the largest relative distance of an array to that of the reference (Frobenius).

    Eigenvectors and terms of a sum have no sign; what is computed from them is compared.
    """
    found: Figures = {}
    assert made.arrays.keys() == reference.arrays.keys()
    for name, expected in reference.arrays.items():
        label, _, part = name.partition(":")
        if expected.dtype.kind != "f" or label.endswith(("/moments", "/kronecker-terms")):
            continue
        kind = f"{label.rpartition('/')[2]} {part.rpartition('/')[2]}"
        expected = expected.astype(np.float64)
        norm = float(np.linalg.norm(expected)) or 1.0
        distance = float(np.linalg.norm(made.arrays[name].astype(np.float64) - expected)) / norm
        found[kind] = max(found.get(kind, 0.0), distance)
    return found


def rank_correlation(made: Made, reference: Made, kind: str = "costs") -> float:
    """The least Spearman correlation of the costs of a block with those of the reference."""
    least = 1.0
    for name, expected in reference.arrays.items():
        if f"/{kind}:" in name and name.endswith("_costs"):
            ranks = [np.argsort(np.argsort(values)) for values in (expected, made.arrays[name])]
            least = min(least, float(np.corrcoef(*ranks)[0, 1]))
    return least


def check_agreement(folder: Path, device: str) -> Figures:
    """Statistics, costs, masks and updates of float32 on the device are those of the CPU, for every pass and solve."""
    figures: Figures = {}
    for number, (what, overrides) in enumerate(STRUCTURES.items()):
        reference = run_shot(folder, "cpu", overrides, f"agree-{number}-cpu")
        made = run_shot(folder, device, overrides, f"agree-{number}-{device}")
        for kind, distance in differences(made, reference).items():
            figures[f"{what}: {kind}"] = distance
            # Solves multiply rounding by the condition of what they solve; a mask that differs would show as 0.1.
            limit = 1e-4 if "factors" in kind or "gradient" in kind else 2e-2
            assert distance < limit, f"{what}: {kind} on {device} is {distance:.2g} from the CPU's, limit {limit:g}"
        assert abs(made.perplexity / reference.perplexity - 1) < 1e-4, "perplexity on the device is another"
    return figures


def check_precision(folder: Path, device: str) -> Figures:
    """How far bfloat16 and TensorFloat-32 are from float32: factors, order of costs, perplexity."""
    overrides = ["prune.structure=rows-and-columns", "prune.sparsity=0.3"]
    reference = run_shot(folder, device, overrides, f"precision-{device}")
    modes = {"bfloat16": (["model.dtype=bfloat16"], 0.05, 0.9)}
    if device == "cuda":
        modes["tf32"] = (["run.precision=tf32"], 5e-3, 0.99)
    figures: Figures = {}
    for mode, (more, limit, least) in modes.items():
        made = run_shot(folder, device, [*overrides, *more], f"precision-{mode}-{device}")
        found = differences(made, reference)
        for kind in ("input-factors A", "output-factors G"):
            figures[f"{mode}: {kind}"] = found[kind]
            assert 0 < found[kind] < limit, f"{mode}: {kind} is {found[kind]:.2g} from float32, limit {limit:g}"
        figures[f"{mode}: rank correlation of costs"] = rank_correlation(made, reference)
        assert figures[f"{mode}: rank correlation of costs"] > least
        figures[f"{mode}: dense perplexity over that of float32"] = made.perplexity / reference.perplexity
        assert abs(math.log(made.perplexity / reference.perplexity)) < limit
    return figures


def check_repeatable(folder: Path, device: str) -> Figures:
    """The same run in another store gives the same bits, in groups and in one."""
    for number, (what, overrides) in enumerate(STRUCTURES.items()):
        once = run_shot(folder, device, overrides, f"twice-{number}-a")
        again = run_shot(folder, device, [*overrides, "run.blocks_per_group=1"], f"twice-{number}-b")
        different = [label for label, digest in once.digests.items() if again.digests[label] != digest]
        assert not different, f"{what}: other bits the second time: {different}"
    return {"ways to prune": len(STRUCTURES)}


def check_sums(_folder: Path, device: str) -> Figures:
    """Sums of 16-bit numbers on the device are those of float64 but for the rounding of float32; triangles survive."""
    figures: Figures = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3000, 2500, generator=generator).to(dtype).to(device)
        total = torch.zeros(2500, 2500, device=device)
        for part in x.split(1000):
            add_gram(total, part)
        exact = x.double().T @ x.double()
        error = float((mirror_lower(total).double() - exact).norm() / exact.norm())
        figures[f"sum of {dtype}"] = error
        # Matrix units add up in float32 but do not round each sum to nearest (1.4e-6 on an H100).
        assert error < 5e-6, f"the sum of {dtype} on {device} is {error:.2g} from the exact one"
    packed = packed_lower(total)
    assert torch.equal(unpacked_lower(packed, 2500), total)
    assert np.array_equal(SymmetricMatrix(packed.cpu().numpy()).to_full(), total.cpu().numpy())
    return figures


def check_out_of_memory(folder: Path, device: str) -> Figures:
    """A batch that is too large for the GPU is halved until it fits; the result is that of asking for the smaller."""
    wide = [f"model.source={folder / 'inputs' / 'wide'}", *STRUCTURES["units"], "calibrate.sequences=32"]
    run_shot(folder, device, wide, "memory-warm-up")
    with memory_limit(0.4, device):
        made = run_shot(folder, device, [*wide, "run.batch_size=32"], "memory-limited")
    used = made.session.context.batch_size
    expected = run_shot(folder, device, [*wide, f"run.batch_size={used}"], "memory-asked")
    assert made.weights == expected.weights, "halving gives other weights than asking"
    assert device == "cpu" or used < 32, "32 sequences fitted, so nothing was tested"
    return {"sequences asked": 32, "sequences used": used}


@contextmanager
def memory_limit(gib: float, device: str) -> Any:
    """Lets this process take no more of a GPU than this; nothing on a CPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


CHECKS: dict[str, Callable[[Path, str], Figures]] = {
    "sums": check_sums,
    "agreement with the CPU": check_agreement,
    "precision": check_precision,
    "repeatability": check_repeatable,
    "out of memory": check_out_of_memory,
}
