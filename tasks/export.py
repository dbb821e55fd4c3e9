"""The pruned checkpoint as a directory, loaded back before it counts."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import ExportError
from surgeon.export import ExportPlan, export_checkpoint, is_exported, require_loads_back
from tasks.calibration import load_tokenizer
from tasks.context import Context, ModelState
from tasks.stage import Outcome
from tasks.weights import block_tensors, open_model

EXPORT_VERSION = 1
_PROBE = "The quick brown fox jumps over the lazy dog. 0123456789"
_PROBE_TOKENS = 16


def export_task(
    context: Context, state: ModelState, destination: Path, dtype: str, card: str
) -> Outcome[dict[str, Any]]:
    """Writes the checkpoint of a state, unless it is there already, and checks that it loads back to the same logits.

    Returns:
        Facts: digest of the weights and dtype.
    """
    record = {"version": EXPORT_VERSION, "weights_digest": state.digest, "dtype": dtype, "card": card}
    if is_exported(destination, record):
        return Outcome({"weights_digest": state.digest, "dtype": dtype}, cached=True, seconds=0.0)
    if not state.updates:
        raise ExportError("nothing has been pruned yet, so there is nothing to export; run the prune stage first")
    start = time.perf_counter()
    prefix = context.model.blocks_path
    replaced = {
        f"{prefix}.{block}.{shape.name}.{part}": block
        for block, shapes in enumerate(context.model.blocks)
        for shape in shapes
        for part in (("weight", "bias") if shape.has_bias else ("weight",))
    }
    plan = ExportPlan(context.model.checkpoint, replaced, partial(block_tensors, context, state), dtype, card, record)
    export_checkpoint(plan, destination, partial(_check, context, state, dtype))
    return Outcome({"weights_digest": state.digest, "dtype": dtype}, cached=False, seconds=time.perf_counter() - start)


def _check(context: Context, state: ModelState, dtype: str, directory: Path) -> None:
    checkpoint = context.model.checkpoint
    ids = load_tokenizer(checkpoint)(_PROBE, return_tensors="pt")["input_ids"][:, :_PROBE_TOKENS]
    model = open_model(context, state)
    with model.loaded(range(model.n_blocks)), torch.no_grad():
        expected = model.model(ids.to(context.device)).logits
    # Loaded in the coarser of both dtypes, which also says how far rounding can go.
    coarser: torch.dtype = context.model.torch_dtype if dtype == "float32" else getattr(torch, dtype)
    require_loads_back(directory, ids, expected, coarser, checkpoint.trust_remote_code)
