"""What can be known to be wrong with pruning before any long work."""

from typing import TYPE_CHECKING

from flows.goal import require_goal
from surgeon.choices import Method, Structure, Widths
from surgeon.errors import ModelError, ParameterError
from surgeon.models.compact_classes import has_index_maps, is_compact
from surgeon.models.families import family_names
from surgeon.pruning.granularity import NMPattern

if TYPE_CHECKING:
    from flows.session import Session


def check_pruning(session: "Session") -> None:
    """Refuses a structure that the model has not, and a target that it cannot reach.

    Raises:
        InputError: naming what is wrong and what to do.
    """
    check_structure(session)
    if session.params.prune.speedup is None:  # which takes measuring, and so comes with the first shot
        require_goal(session)
        if session.recipe.method is Method.LAYERCHOP:
            from flows.layerchop import layer_rule  # here, because it is about sessions too

            layer_rule(session.model, session.params.prune.layerchop, session.goal.fraction)
    if session.recipe.method is Method.BONSAI:
        session.params.prune.bonsai.require_sequences(session.params.calibrate.sequences)


def check_prunable(session: "Session") -> None:
    """Refuses a model that can be evaluated but not pruned: one with index maps, or a block without linears.

    Raises:
        ModelError: naming the model.
    """
    path = session.checkpoint.path
    if is_compact(path) and has_index_maps(path):
        raise ModelError(
            f"{session.checkpoint.source} is a compact export with index maps: its linears read or write only some of "
            "what the model around them has. It can be evaluated but not pruned again; prune the model it was made "
            "from, or an export of that with export.layout=dense"
        )
    empty = [str(index) for index, block in enumerate(session.model.blocks) if not block]
    if empty:
        raise ModelError(
            f"{session.checkpoint.source} has no linears any more in {len(empty)} of its blocks "
            f"({', '.join(empty[:8])}), whose attention and MLP are gone. It can be evaluated but not pruned "
            "again; prune the model it was made from, or an export of that with export.layout=dense"
        )


def check_structure(session: "Session") -> None:
    """Refuses units of a model whose couplings are unknown, and N:M where a linear's inputs do not divide.

    Raises:
        ParameterError: naming the family, or block and linear.
    """
    pattern = session.params.prune.structure
    if pattern is Structure.UNITS and session.model.couplings is None:
        if is_compact(session.checkpoint.path):
            check_prunable(session)
            raise ParameterError(
                f"prune.structure: {pattern}: blocks of {session.checkpoint.source} have no attention or no MLP any "
                "more, so its units are not known; prune the model it was made from to a higher target, or use "
                f"another -S prune.structure, such as {Structure.WEIGHTS}"
            )
        raise ParameterError(
            f"prune.structure: {pattern}: what belongs together in {session.checkpoint.source} is not known "
            f"(described families: {family_names()}); use "
            f"-S prune.structure={Structure.ROWS_AND_COLUMNS}, which needs no description, or describe the family "
            "in surgeon/models/families.py"
        )
    units = session.recipe.units
    if units and units.heads and units.widths is Widths.UNIFORM and not session.model.heads_are_free:
        raise ParameterError(
            f"prune.heads: the stock configuration of {session.checkpoint.source} ties the number of heads to the "
            f"width, so equal widths cannot lose any; use prune.heads=false or prune.widths={Widths.FREE}"
        )
    if not isinstance(pattern, NMPattern):
        return
    for index, block in enumerate(session.model.blocks):
        for linear in block:
            if linear.n_in % pattern.m:
                raise ParameterError(
                    f"prune.structure: {pattern} needs inputs that divide into groups of {pattern.m}, but block "
                    f"{index}, linear {linear.name} has {linear.n_in} inputs; choose another M, or weights"
                )
