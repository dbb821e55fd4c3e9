"""Adding up what was measured of shards of the calibration sequences, in the order of the shards.

Statistics are means over tokens, so that of all sequences is the mean of those of the shards, weighted by their tokens.
The order never depends on who computed a shard or when, and neither do the bits.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.curvature.spec import Statistic
from surgeon.store import BFloat16Array, Reference, StoredObject, SymmetricMatrix
from tasks.context import Context
from tasks.curvature import Measured, statistic_request
from tasks.stage import Outcome, Product, Request, produce_all


def reduction_requests(
    context: Context, measured: Measured, block: int, statistics: Sequence[Statistic]
) -> dict[Statistic, Request]:
    """The requests for statistics of a block over all sequences."""
    requests = {}
    for statistic in statistics:
        request = statistic_request(context, measured, statistic, block)
        assert request is not None, f"{statistic} is not of the first level"
        requests[statistic] = request
    return requests


def reduction_task(
    context: Context, measured: Measured, block: int, statistics: Sequence[Statistic]
) -> Outcome[list[Reference]]:
    """Statistics of the first level of a block over all sequences, from those of the shards in the store."""

    def compute(missing: Collection[Statistic]) -> dict[Statistic, Callable[[], Product]]:
        return {statistic: partial(_reduced, context, measured, block, statistic) for statistic in missing}

    requests = reduction_requests(context, measured, block, statistics)
    first = next(iter(requests.values()))
    return produce_all(context, requests, first.key(context), compute)


def _reduced(context: Context, measured: Measured, block: int, statistic: Statistic) -> Product:
    store = context.store.open()
    opened = []
    for part in measured.parts(measured.calibration.attributes["n_sequences"]):
        request = statistic_request(context, part, statistic, block)
        assert request is not None, f"{statistic} is not of the first level"
        opened.append(store.open(request.key(context)))
    n_tokens = [int(stored.attributes["n_tokens"]) for stored in opened]
    shares = [tokens / sum(n_tokens) for tokens in n_tokens]
    arrays = {name: _mean([(stored, name) for stored in opened], shares) for name in opened[0].names()}
    return Product(arrays, {**opened[0].attributes, "n_tokens": sum(n_tokens)})


def _mean(places: Sequence[tuple[StoredObject, str]], shares: Sequence[float]) -> Any:
    """The weighted mean of one array of several objects, read one after the other; sums are float64."""
    total: NDArray[np.float64] | None = None
    for (stored, name), share in zip(places, shares, strict=True):
        form = stored.as_stored(name)
        assert not isinstance(form, BFloat16Array), "statistics are float32"
        values = form.packed if isinstance(form, SymmetricMatrix) else form
        if total is None:
            total = np.zeros(values.shape, dtype=np.float64)
        total += share * values.astype(np.float64)
    assert total is not None, "there are no shards"
    mean = total.astype(np.float32)
    return SymmetricMatrix(mean) if isinstance(form, SymmetricMatrix) else mean
