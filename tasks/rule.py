"""How the mask of a shot is chosen: how much is to go, of what, and by which recipe."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.choices import Resource
from surgeon.pruning.units import SubLayer, SubLayerKind
from surgeon.recipe import Recipe


@dataclass(frozen=True)
class Usage:
    """What a sub-layer uses of the resource that a target is about, by kind.

    Attributes:
        resource: which.
        mlp: seconds of the MLP of one block that keeps 0, 1, … neurons; None where the resource is not time.
        attention: the same of the attention, by key/value groups.
    """

    resource: Resource = Resource.WEIGHTS
    mlp: tuple[float, ...] | None = None
    attention: tuple[float, ...] | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What masks depend on, for their key."""
        times = hashlib.sha256(repr((self.mlp, self.attention)).encode()).hexdigest() if self.mlp else None
        return {"resource": self.resource, "times": times}

    def of(self, sub_layer: SubLayer) -> NDArray[np.float64]:
        """Usage of a sub-layer that keeps 0, 1, … units, `[n_units + 1]`."""
        if self.resource is Resource.SECONDS:
            seconds = self.mlp if sub_layer.kind is SubLayerKind.MLP else self.attention
            assert seconds is not None and len(seconds) == sub_layer.n_units + 1, f"no times of the {sub_layer.kind}"
            return np.array(seconds)
        weights = self.resource is Resource.WEIGHTS
        each = sub_layer.weights_per_unit if weights else sub_layer.parameters_per_unit
        return each * np.arange(sub_layer.n_units + 1, dtype=np.float64)


WEIGHTS = Usage()
"""What a sparsity is about."""


@dataclass(frozen=True)
class MaskRule:
    """How the mask of a shot is chosen.

    Attributes:
        target: fraction to be gone after the shot, of all weights or of what the dense decoder blocks use.
        recipe: what goes as one, and within what the cheapest goes.
        usage: what the target is about; other than weights for coupled units only.
    """

    target: float
    recipe: Recipe
    usage: Usage = WEIGHTS
