"""The times of a model's blocks by what they keep, measured once for a machine and a shape of batch."""

from functools import partial

from surgeon.benchmarking.block_times import BlockTimes, measure_block_times
from surgeon.benchmarking.machine import describe_machine
from surgeon.store import Reference
from tasks.context import Context
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce

BLOCK_TIMES = Stage("block-times", 1, ("surgeon.benchmarking.block_times",))


def block_times_request(context: Context, batch_size: int, length: int) -> Request:
    """The request for the times of the dense model's blocks on this machine."""
    parameters = {"batch_size": batch_size, "length": length, "machine": describe_machine(context.device)}
    return Request(BLOCK_TIMES, parameters, {"weights": context.model.checkpoint.digest}, "dense/block-times")


def block_times_task(context: Context, batch_size: int, length: int) -> Outcome[Reference]:
    """Measures the times, unless that was done before; the table is the reference's attributes.

    A time is never measured twice into the same run, so that what is decided from it stays the same when it resumes.
    """

    def compute() -> Product:
        model = context.model
        progress = partial(report, "dense: block times")
        times = measure_block_times(
            model.checkpoint, model.torch_dtype, context.device, batch_size, length, progress=progress
        )
        return Product({}, {**times.to_json(), "batch_size": batch_size, "length": length})

    return produce(context, block_times_request(context, batch_size, length), compute)


def read_block_times(context: Context, reference: Reference) -> BlockTimes:
    """The table that a reference stands for."""
    return BlockTimes.from_json(context.store.open().open(reference.key).attributes)
