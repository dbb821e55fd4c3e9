"""The sections about weights: where sparsity went, and how much the remaining weights changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.anatomy import Anatomy, LinearFacts
from flows.report.block_map import build_map
from flows.report.numbers import percent
from flows.report.tables import Table, bar
from surgeon.choices import UpdateRule


def allocation_section(results: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """The map of what was removed, and the same by kind of linear."""
    linears = anatomy.linears
    n_blocks = len({linear.block for linear in linears})
    gone = f" Gone whole: blocks {', '.join(map(str, anatomy.removed))}." if anatomy.removed else ""
    return {
        "map_note": f"Weights removed after the last shot, for each of {n_blocks} blocks and each kind of linear. "
        f"A linear loses whole rows and columns where its neurons or channels went, or single weights.{gone}",
        "removed_map": build_map(linears, _sparsity, factor=100, unit="% removed"),
        "kinds": _kinds(linears),
        "kept": _kept(results["shots"][-1]["kept"]),
    }


def update_section(anatomy: Anatomy, update: UpdateRule) -> dict[str, Any]:
    """The map of how much what was kept has changed.

    Args:
        anatomy: of the run.
        update: how kept weights are changed.
    """
    known = [linear for linear in anatomy.linears if linear.update_size is not None]
    changed = [linear for linear in known if linear.update_size]
    note = (
        "Frobenius norm of the change that the update made to what was kept in the last shot, relative to the norm of "
        "the weights before it: how much the remaining weights make up for the removed ones."
    )
    if not changed:
        note = "No kept weight was changed in the last shot."
        if update is UpdateRule.NONE:
            note = "The kept weights are those of the dense model: this method removes, and updates nothing."
    corrected = any(linear.correction_size for linear in anatomy.linears)
    return {
        "update_note": note,
        "update_map": _size_map(anatomy.linears, "update_size") if changed else None,
        "correction_map": _size_map(anatomy.linears, "correction_size") if corrected else None,
    }


def _size_map(linears: Sequence[LinearFacts], name: str) -> Any:
    def size(chosen: Sequence[LinearFacts]) -> float | None:
        value: float | None = getattr(chosen[0], name)
        return value

    return build_map(linears, size, factor=100, unit="% of the norm", adds_up=False)


def _sparsity(chosen: Sequence[LinearFacts]) -> float:
    return 1.0 - sum(linear.n_live for linear in chosen) / _weights(chosen)


def _weights(chosen: Sequence[LinearFacts]) -> int:
    return sum(linear.n_out * linear.n_in for linear in chosen)


def _kinds(linears: Sequence[LinearFacts]) -> Table:
    by_kind: dict[str, list[LinearFacts]] = {}
    for linear in linears:
        by_kind.setdefault(linear.linear, []).append(linear)
    gone = {kind: _weights(mine) - sum(linear.n_live for linear in mine) for kind, mine in by_kind.items()}
    total = max(1, sum(gone.values()))
    largest = max(_sparsity(mine) for mine in by_kind.values()) or 1.0
    rows = [
        (
            kind,
            bar(_sparsity(mine) / largest),
            percent(_sparsity(mine)),
            f"{gone[kind]:,}",
            percent(gone[kind] / total, 0),
            f"{_weights(mine):,}",
        )
        for kind, mine in by_kind.items()
    ]
    head = ("kind", "", "removed", "weights removed", "share of all removed", "weights before")
    return Table("All blocks together", head, rows, style="kinds")


def _kept(kept: Mapping[str, Sequence[int]] | None) -> Table | None:
    if not kept:
        return None
    names = {"mlp": "MLP neurons", "attention": "key/value groups"}
    blocks = range(len(next(iter(kept.values()))))
    rows = [(str(block), *(f"{kept[part][block]:,}" for part in kept)) for block in blocks]
    return Table("After the last shot", ("block", *(names.get(part, part) for part in kept)), rows)
