"""Bytes of stored results, from shapes: what a run will add to the disk."""

from collections.abc import Collection

from surgeon.choices import Structure
from surgeon.curvature.spec import Statistic
from surgeon.pruning.granularity import is_structured
from surgeon.recipe import Recipe
from tasks.context import LinearShape, ModelSpec

FLOAT32 = 4
FLOAT64 = 8
ARRAY_BYTES = 20 << 10
"""Metadata and directories of an array, and what files are rounded up to on the disk."""
OBJECT_BYTES = 20 << 10
"""Reference, record and groups of an object; they stay when its arrays are dropped."""


def shared_inputs(model: ModelSpec, block: int, linears: Collection[str] | None = None) -> list[LinearShape]:
    """One of those linears of a block that read the same input, for each input.

    Args:
        model: its couplings say which do; where they are not known, each is counted.
        block: index.
        linears: names of those that count; None for all.
    """
    shapes = [s for s in model.blocks[block] if linears is None or s.name in linears]
    if model.couplings is None:
        return shapes
    coupled = model.couplings[block]
    together = (coupled.attention.input_linears, coupled.mlp.row_linears)
    first: dict[str, LinearShape] = {}
    for shape in shapes:
        first.setdefault(next((names[0] for names in together if shape.name in names), shape.name), shape)
    return list(first.values())


def n_arrays(model: ModelSpec, kind: str, block: int, recipe: Recipe, linears: Collection[str] | None) -> int:
    """Arrays in a result of a block."""
    shapes = [s for s in model.blocks[block] if linears is None or s.name in linears]
    inputs = len(shared_inputs(model, block, linears))
    whole = len(model.blocks[block])
    biases = sum(s.has_bias for s in model.blocks[block])
    structured = is_structured(recipe.granularity)
    counts = {
        Statistic.INPUT_FACTORS.value: 2 * inputs,
        Statistic.MOMENTS.value: inputs + 2 * len(shapes),
        Statistic.KRONECKER_TERMS.value: 2 * len(shapes),
        "costs": (6 if recipe.granularity is Structure.UNITS else 4) if structured else whole,
        "update": whole + biases + 2 + (0 if structured else whole),
        "mask": 2 if structured else 3,
        "boundary": 1,
        "gradient": 1,
        "shot": 0,
        "evaluation": 0,
        "sample": 0,
        "prior": 1,
        "sub-model": 0,
        "ranking": 2,
        "similarity": 2,
        "sub-layer-similarity": 2,
        "removal-losses": 0,
        "block-cost": 0,
        "selection": 0,
        "dropped": whole + biases + 2,
        "corpus": 4,
        "training": 3 * sum(len(linears) + 2 for linears in model.blocks),
        "recovery": 0,
    }
    counts["correction"] = counts["update"]
    counts["recovered"] = counts["update"] + 2
    return counts.get(kind, len(shapes))


def array_bytes(
    model: ModelSpec, kind: str, block: int, recipe: Recipe, linears: Collection[str] | None, n_tokens: int = 0
) -> int:
    """Bytes of the arrays in a result of a block.

    Args:
        model: shapes.
        kind: of the result, as in the store.
        block: index.
        recipe: how the run prunes.
        linears: names of those whose statistics are measured; None for all.
        n_tokens: calibration tokens, which boundaries and gradients have hidden states for.
    """
    shapes = [s for s in model.blocks[block] if linears is None or s.name in linears]
    inputs = shared_inputs(model, block, linears)
    whole = model.blocks[block]
    n_weights = sum(s.n_out * (s.n_in + s.has_bias) for s in shapes)
    sides = sum(s.n_out + s.n_in for s in whole)
    rank = max(1, recipe.curvature.rank)
    squares = sum(s.n_out**2 + (s.n_in + s.has_bias) ** 2 for s in shapes)
    hidden = FLOAT32 * n_tokens * model.width
    updated = FLOAT32 * sum(s.n_weights + s.n_out * s.has_bias for s in whole) + sides
    if not is_structured(recipe.granularity):
        updated += sum(s.n_out * -(-s.n_in // 8) for s in whole)
    n_units = sum(max((s.n_in for s in b), default=0) for b in model.blocks)  # neurons; heads are few
    sizes = {
        Statistic.INPUT_FACTORS.value: sum(2 * s.n_in * (s.n_in + 1) + FLOAT32 * s.n_in for s in inputs),
        Statistic.OUTPUT_FACTORS.value: sum(2 * s.n_out * (s.n_out + 1) for s in shapes),
        Statistic.DIAGONAL.value: FLOAT32 * n_weights,
        Statistic.LOSS_GRADIENT.value: FLOAT32 * n_weights,
        Statistic.MOMENTS.value: FLOAT32
        * (n_weights + sum(s.n_out**2 for s in shapes) + sum((s.n_in + s.has_bias) ** 2 for s in inputs)),
        Statistic.KRONECKER_TERMS.value: FLOAT32 * rank * squares,
        "boundary": hidden,
        "gradient": hidden * recipe.curvature.draws,
        "costs": _cost_bytes(whole, recipe, sides),
        "mask": sum(s.n_out + s.n_in for b in model.blocks for s in b) if is_structured(recipe.granularity) else 0,
        "update": updated,
        "correction": updated,
        "prior": FLOAT64 * n_units,
        "ranking": 2 * FLOAT64 * n_units,
        "recovered": updated + FLOAT32 * (model.n_parameters - model.n_weights) // model.n_blocks,
        "similarity": FLOAT64 * (model.n_blocks + (model.n_blocks + 1) ** 2),
        "sub-layer-similarity": FLOAT64 * 2 * model.n_blocks,
        "dropped": FLOAT32 * sum(s.n_weights + s.n_out * s.has_bias for s in whole) + sides,
    }
    return sizes.get(kind, 0)


def _cost_bytes(whole: tuple[LinearShape, ...], recipe: Recipe, sides: int) -> int:
    if recipe.granularity is Structure.UNITS:
        return 16 * max(s.n_in for s in whole) + sides
    if is_structured(recipe.granularity):
        return 9 * sides
    return FLOAT32 * sum(s.n_weights for s in whole)
