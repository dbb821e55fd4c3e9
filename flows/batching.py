"""How many sequences run at a time: as asked for, as the memory of a GPU holds, or fewer where that was too many.

A batch that does not fit into the memory of a GPU is halved, and the work goes on: keys hold the batch that was used,
so nothing is reused that was computed in another way. `data/memory.json` remembers it, so that the next run of the
model on the device starts with what is known to fit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flows.workspace import read_json, write_json
from surgeon.choices import Device
from surgeon.devices import describe_device
from surgeon.errors import BatchMemoryError, MemoryShortageError
from surgeon.memory import MemoryEstimate

if TYPE_CHECKING:
    from flows.session import Session

CPU_BATCH = 4
"""Sequences at a time on a CPU, where more are no faster."""
ENOUGH_TOKENS = 8192
"""Tokens of a batch that fill a large GPU: more would only take memory that is better spent on blocks."""


def largest_batch(estimate: Callable[[int], MemoryEstimate], budget_gib: float, n_sequences: int, length: int) -> int:
    """The largest power of two of sequences with which one block at a time stays within the memory of a GPU.

    Args:
        estimate: of a pass, by the number of sequences at a time.
        budget_gib: memory of the GPU that may be taken.
        n_sequences: there are no more.
        length: tokens of each; a batch has at most `ENOUGH_TOKENS`, or is one sequence.

    Returns:
        At least 1, whether it fits or not: what does not fit is refused where the blocks of a group are chosen.
    """
    batch = 1
    while (
        2 * batch <= n_sequences
        and 2 * batch * length <= ENOUGH_TOKENS
        and estimate(2 * batch).device_gib <= budget_gib
    ):
        batch *= 2
    return batch


def asked_batch(session: "Session") -> int:
    """Sequences at a time as asked for, or as chosen for the device."""
    given = session.params.run.batch_size
    if given is not None:
        return given
    if session.device == Device.CPU:
        return CPU_BATCH
    calibrate, evaluate = session.params.calibrate, session.params.evaluate

    def estimate(batch_size: int) -> MemoryEstimate:
        return session.memory_estimate(1, batch_size)

    return largest_batch(
        estimate, session.memory_budget_gib, calibrate.sequences, max(calibrate.length, evaluate.length)
    )


def known_limits(session: "Session") -> dict[str, int]:
    """`batch_size` and `blocks_per_group` that memory was found to hold; empty if nothing was too large yet."""
    entries: dict[str, dict[str, Any]] = read_json(session.workspace.memory) or {}
    entry = entries.get(_name(session), {}) if entries else {}
    return {name: int(entry[name]) for name in ("batch_size", "blocks_per_group") if name in entry}


def halve(session: "Session", error: BatchMemoryError) -> None:
    """Halves the batch of a session after it did not fit, and then the blocks held at a time.

    Args:
        session: changed: its context has the smaller numbers from now on.
        error: what happened.

    Raises:
        MemoryShortageError: nothing can be halved any more.
    """
    context = session.context
    if context.batch_size > 1:
        smaller = replace(context, batch_size=context.batch_size // 2)
        what = f"with {smaller.batch_size} sequences at a time instead of {context.batch_size}"
    elif context.blocks_per_group > 1 and session.params.run.blocks_per_group is None:
        smaller = replace(context, blocks_per_group=context.blocks_per_group // 2)
        what = f"with {smaller.blocks_per_group} blocks at a time instead of {context.blocks_per_group}"
    else:
        raise MemoryShortageError(
            f"{error} One sequence of {_length(session)} tokens and {context.blocks_per_group} block(s) at a time do "
            f"not fit into the memory of {describe_device(context.device)}: lower calibrate.length or evaluate.length, "
            "use run.blocks_per_group=1 or model.dtype=bfloat16, or end what else takes its memory. What was finished "
            "is kept."
        )
    session.adopt(smaller)
    _remember(session)
    session.warn(f"{error} It goes on {what}; {session.workspace.memory.name} remembers that.")


def _remember(session: "Session") -> None:
    entries = read_json(session.workspace.memory) or {}
    context = session.context
    entries[_name(session)] = {
        "asked": session.params.run.batch_size,
        "batch_size": context.batch_size,
        "blocks_per_group": context.blocks_per_group,
    }
    write_json(session.workspace.memory, entries)


def _name(session: "Session") -> str:
    """What a limit depends on: model, device, what passes compute in, tokens of a sequence, and the batch asked for."""
    given, asked = session.params, session.params.run.batch_size
    return (
        f"{session.checkpoint.digest}, {describe_device(session.device)}, {given.model.dtype}, {given.run.precision}, "
        f"{_length(session)} tokens, {'any number' if asked is None else asked} at a time"
    )


def _length(session: "Session") -> int:
    return max(session.params.calibrate.length, session.params.evaluate.length)
