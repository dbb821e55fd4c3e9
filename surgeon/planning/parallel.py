"""What some work takes when several workers share it.

A shot is cut in three ways. Passes and factors go by *shards* of the calibration sequences: every worker runs the whole
model on its own sequences. Costs, updates and the sums over shards go by *blocks*. The mask, evaluations and what
begins and ends a run are *serial*. Within each part workers compute at the rate of one device each, but all of them
share the store, which gives no more than its own bandwidth. So with ever more workers what remains is the serial part,
the largest share of blocks that one worker gets, and the bytes.

Reference: Amdahl 1967, for the serial part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from surgeon.planning.rates import Rates
from surgeon.planning.work import Operation, Work

SHARED = (Operation.READS, Operation.WRITES, Operation.LOADS, Operation.FILES)
"""Operations whose rate all workers together cannot raise above that of the store."""


class Cut(StrEnum):
    """By what the tasks of a kind are dealt out to workers."""

    SHARDS = "shards"
    BLOCKS = "blocks"
    SERIAL = "serial"


CUTS: Mapping[str, Cut] = {
    "boundary": Cut.SHARDS,
    "curvature": Cut.SHARDS,
    "loss-gradient": Cut.SHARDS,
    "reduction": Cut.BLOCKS,
    "costs": Cut.BLOCKS,
    "update": Cut.BLOCKS,
}
"""By kind of task; others are serial."""


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    Attributes:
        number: of workers, each with a device of its own.
        shards: parts that the calibration sequences are cut into.
        blocks: of the model.
        blocks_per_group: blocks that are held at once, whose sums over shards are formed at the same time.
        store_bytes_s: what the store reads or writes at most in a second, for all workers together.
    """

    number: int
    shards: int
    blocks: int
    blocks_per_group: int
    store_bytes_s: float

    def at_once(self, kind: str) -> float:
        """How many workers are busy on average with tasks of a kind."""
        cut = CUTS.get(kind, Cut.SERIAL)
        if cut is Cut.SERIAL:
            return 1.0
        n_tasks = self.shards if cut is Cut.SHARDS else self.blocks
        if kind == "reduction":
            n_tasks = self.blocks_per_group
        rounds = -(-n_tasks // self.number)
        return n_tasks / rounds


def parallel_seconds(work: Mapping[str, Work], rates: Rates, workers: Workers) -> dict[str, float]:
    """Seconds of each kind of task when workers share them; arguments as those of `parallel_terms`."""
    return {kind: sum(terms.values()) for kind, terms in parallel_terms(work, rates, workers).items()}


def parallel_terms(work: Mapping[str, Work], rates: Rates, workers: Workers) -> dict[str, dict[Operation, float]]:
    """Seconds of each kind of task and operation when workers share them.

    Args:
        work: of all tasks of a kind together, by kind; with shards, what each shard reads, loads and writes is in it.
        rates: of one worker.
        workers: how many, and what they share.
    """
    return {
        kind: {
            operation: rates.seconds(Work({operation: amount})) / _faster(operation, rates, workers, kind)
            for operation, amount in each.amounts.items()
        }
        for kind, each in work.items()
    }


def _faster(operation: Operation, rates: Rates, workers: Workers, kind: str) -> float:
    """How many times as fast as one worker all of them are."""
    at_once = workers.at_once(kind)
    if operation not in SHARED:
        return at_once
    # One worker alone is not slowed down: its rate was measured on that store.
    return min(at_once, max(1.0, workers.store_bytes_s / rates.per_second[operation]))
