"""The pruned checkpoint as a directory, loaded back before it counts."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgeon.choices import ExportLayout
from surgeon.errors import ExportError
from surgeon.export import (
    ExportPlan,
    Probe,
    PrunedModel,
    expected_logits,
    export_checkpoint,
    is_exported,
    plan_export,
    read_record,
    require_loads_back,
)
from tasks.calibration import load_tokenizer
from tasks.context import Context, ModelState
from tasks.stage import Outcome, begin
from tasks.weights import open_model, read_linears, read_live, read_others, trunk_tensors

EXPORT_VERSION = 3
_PROBES = ("The quick brown fox jumps over the lazy dog. 0123456789", "Pack my box with five dozen")
_PROBE_TOKENS = (16, 11)


def export_record(state: ModelState, dtype: str, layout: str, card: str) -> dict[str, Any]:
    """What identifies the export of a state; arguments as those of `export_task`."""
    return {
        "version": EXPORT_VERSION,
        "weights_digest": state.digest,
        "dtype": dtype,
        "asked_layout": layout,
        "card": card,
    }


def export_task(
    context: Context, state: ModelState, destination: Path, dtype: str, layout: str, card: str
) -> Outcome[dict[str, Any]]:
    """Writes the checkpoint of a state, unless it is there already, and checks that it loads back to the same logits.

    Args:
        context: where.
        state: the pruned model.
        destination: directory that is written, or replaced.
        dtype: of the float tensors.
        layout: form asked for, one of `ExportLayout`.
        card: model card with `CARD_FACTS` where the facts of the export go.

    Returns:
        Facts of the export, with the digest of the weights and the dtype.
    """
    record = export_record(state, dtype, layout, card)
    identity = {"weights_digest": state.digest, "dtype": dtype}
    if is_exported(destination, record) and (found := read_record(destination)) is not None:
        return Outcome({**identity, **found["facts"]}, cached=True, seconds=0.0)
    if state.is_dense:
        raise ExportError("nothing has been pruned yet, so there is nothing to export; run the prune stage first")
    start = begin()
    checkpoint = context.model.checkpoint
    pruned = PrunedModel(
        checkpoint,
        partial(read_linears, context, state),
        partial(read_live, context, state),
        removed=state.removed,
        others=partial(read_others, context, state),
        trunk=trunk_tensors(context, state),
    )
    plan = plan_export(pruned, dtype, ExportLayout(layout))
    exported = export_checkpoint(plan, destination, card, record, partial(_check, context, state, plan))
    return Outcome({**identity, **exported.facts}, cached=False, seconds=time.perf_counter() - start)


def _check(context: Context, state: ModelState, plan: ExportPlan, directory: Path) -> float:
    tokenizer = load_tokenizer(context.model.checkpoint)
    encoded = [tokenizer(text)["input_ids"][:n] for text, n in zip(_PROBES, _PROBE_TOKENS, strict=True)]
    probe = Probe.of(encoded)
    expected = expected_logits(open_model(context, state), probe)
    # Loaded in the coarser of both dtypes, which also says how far rounding can go.
    coarser: torch.dtype = context.model.torch_dtype if plan.dtype is torch.float32 else plan.dtype
    return require_loads_back(directory, probe, expected, coarser, plan.needs_code)
