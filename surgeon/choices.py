"""The choices a user makes by name, in parameters and in calls of the library."""

from enum import StrEnum


class Method(StrEnum):
    """How the weights to remove are chosen.

    Reference: van der Ouderaa et al. 2024, *The LLM Surgeon* (`llm-surgeon`).
    """

    LLM_SURGEON = "llm-surgeon"


class Structure(StrEnum):
    """What is removed from a linear: rows (outputs), columns (inputs), or whichever of both costs less."""

    ROWS = "rows"
    COLUMNS = "columns"
    ROWS_AND_COLUMNS = "rows-and-columns"


class Curvature(StrEnum):
    """How the curvature of the loss is approximated: `kfac` is one Kronecker product per linear."""

    KFAC = "kfac"


class Cost(StrEnum):
    """What removing a structure costs: with all other weights adapted to it (`obs`) or left as they are (`obd`)."""

    OBS = "obs"
    OBD = "obd"


class Ranking(StrEnum):
    """What is compared between linears: the cost of a structure, or its cost divided by its number of weights."""

    COST = "cost"
    COST_PER_WEIGHT = "cost-per-weight"


class UpdateRule(StrEnum):
    """How the remaining weights are adapted to a removal.

    `exact` solves for all removed rows and columns of a linear together, `independent` adds up the solution for its
    rows and that for its columns (as published), `none` leaves the remaining weights as they are.
    """

    EXACT = "exact"
    INDEPENDENT = "independent"
    NONE = "none"


class SequenceOrder(StrEnum):
    """Where calibration sequences are cut: from a grid without overlap, or at independent random offsets."""

    GRID = "grid"
    RANDOM_OFFSETS = "random-offsets"


class Dtype(StrEnum):
    """Number format of the weights; the names are those of torch."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Device(StrEnum):
    """Where the model runs: `auto` takes a CUDA device when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Keep(StrEnum):
    """Which shots keep the large payloads of their stored results: only the last one, all of them, or none."""

    LAST = "last"
    ALL = "all"
    NONE = "none"
