"""What the candidates of a shot cost, as they were compared, and which of them went.

A candidate is a unit, a row, a column, a weight or a group of weights. What is compared is its cost in nats per token,
or for rows and columns with `ranking: cost-per-weight` that cost divided by the weights it frees. (With a curvature
that knows no gradients the unit is another: see docs/methods.md.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flows.shot import blocks_from_json
from surgeon.choices import Allocation, Ranking, Structure
from surgeon.pruning.costs import GONE
from surgeon.pruning.granularity import Granularity, is_structured, parse_granularity
from surgeon.pruning.selection import Cut, candidate_costs, weights_that_stay
from surgeon.pruning.units import SubLayerKind
from surgeon.store import Reference, Store, StoredObject
from tasks.context import LinearShape, split_columns, split_rows

Array = NDArray[Any]
UNITS = {SubLayerKind.MLP: "neurons", SubLayerKind.ATTENTION: "key/value groups"}
COST, PER_WEIGHT = "cost", "cost per weight"


@dataclass(frozen=True, eq=False)
class Sample:
    """Candidates of one kind of one linear (or of one sub-layer of a block).

    Attributes:
        linear: name in its block; for units None.
        of: "neurons", "key/value groups", "rows", "columns", "weights" or, for N:M, "groups of M weights".
        unit: `COST` or `PER_WEIGHT`.
        values: what was compared, `[n]`; candidates that were gone or dead before the shot are not in it.
        gone: which of them went, `[n]` bool.
        threshold: at or below which they went, in the unit of the values; None where there is not one such number.
    """

    linear: str | None
    of: str
    unit: str
    values: Array
    gone: NDArray[np.bool_]
    threshold: float | None


@dataclass(frozen=True)
class MaskReader:
    """The mask of a shot with what its key says of it.

    Args:
        store: where it is.
        mask: its reference.
        blocks: linears of all blocks.
    """

    store: Store
    mask: Reference
    blocks: Sequence[tuple[LinearShape, ...]]

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Target, structure, ranking and allocation; for units what widths are permitted."""
        return self.store.parameters(self.mask.key)

    @cached_property
    def granularity(self) -> Granularity:
        """What goes as one."""
        return parse_granularity(self.parameters["structure"])

    @cached_property
    def _stored(self) -> StoredObject:
        return self.store.open(self.mask.key)

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        return {name: self._stored.array(name) for name in self._stored.names()}

    @property
    def _threshold(self) -> float | None:
        """The one of all candidates; None where each linear has its own, or nothing went."""
        attributes = self.mask.attributes
        is_shared = self.parameters["allocation"] == Allocation.GLOBAL
        return attributes["threshold"] if is_shared and attributes["n_removed"] else None

    def samples(self, block: int, costs: StoredObject) -> Iterator[Sample]:
        """All candidates of a block, one linear at a time."""
        if self.granularity is Structure.UNITS:
            yield from self._units(block, costs)
        elif is_structured(self.granularity):
            yield from self._structures(block, costs)
        else:
            yield from self._weights(block, costs)

    def _units(self, block: int, costs: StoredObject) -> Iterator[Sample]:
        """They go in their order, whatever the others cost."""
        # Else it is per freed weight, parameter or second.
        threshold = self._threshold if self.parameters["ranking"] == Ranking.COST else None
        for kind, of in UNITS.items():
            values = costs.array(f"{kind}/costs")
            n_gone = values.size - self.mask.attributes["kept"][kind][block]
            yield Sample(None, of, COST, values, np.arange(values.size) < n_gone, threshold)

    def _structures(self, block: int, costs: StoredObject) -> Iterator[Sample]:
        per_weight = self.parameters["ranking"] == Ranking.COST_PER_WEIGHT
        unit = PER_WEIGHT if per_weight else COST
        threshold = self._threshold
        flat = [shape for shapes in self.blocks for shape in shapes]
        first = sum(len(shapes) for shapes in self.blocks[:block])
        shapes = self.blocks[block]
        sides: dict[str, list[tuple[Array, Array, Array]]] = {}
        for of, part, split in (("rows", "row", split_rows), ("columns", "column", split_columns)):
            all_stay = split(flat, self._arrays[f"live_{of}"])
            parts = (split(shapes, costs.array(f"{part}_costs")), split(shapes, costs.array(f"live_{of}")))
            sides[of] = list(zip(*parts, all_stay[first : first + len(shapes)], strict=True))
        for index, shape in enumerate(shapes):
            for of, other in (("rows", "columns"), ("columns", "rows")):
                if self.granularity not in (of, Structure.ROWS_AND_COLUMNS):
                    continue
                values, live, stays = sides[of][index]
                n_freed = int(sides[other][index][1].sum())
                if n_freed:
                    compared = values[live] / n_freed if per_weight else values[live]
                    yield Sample(shape.name, of, unit, compared, ~stays[live], threshold)

    def _weights(self, block: int, costs: StoredObject) -> Iterator[Sample]:
        first = sum(len(shapes) for shapes in self.blocks[:block])
        for index, shape in enumerate(self.blocks[block], start=first):
            cut = Cut(*(self._arrays[part][index].item() for part in ("threshold", "n_ties", "per_row")))
            values = torch.from_numpy(costs.array(f"{shape.name}/costs"))
            candidates = candidate_costs(values, self.granularity)
            live = candidates != GONE
            goes = ~weights_that_stay(values, self.granularity, cut)
            of = "weights"
            if candidates.shape != values.shape:
                of = f"groups of {values.shape[1] // candidates.shape[1]} weights"
                # The cut says which groups go; a group that goes loses its N cheapest.
                goes = _group_goes(candidates, cut)
            threshold = cut.threshold if cut.per_row < 0 and self.mask.attributes["n_removed"] else None
            yield Sample(shape.name, of, COST, candidates[live].numpy(), goes[live].numpy(), threshold)


def _group_goes(candidates: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Which groups of an N:M pattern lose weights: groups are candidates of a cut as single weights are."""
    return ~weights_that_stay(candidates, Structure.WEIGHTS, cut)


def block_shapes(references: Mapping[str, Reference], shot: str) -> list[tuple[LinearShape, ...]]:
    """Linears of all blocks of the dense model in module order, from the record of a shot."""
    record = references.get(f"{shot}/shot")
    return [] if record is None else blocks_from_json(record.attributes["blocks"])
