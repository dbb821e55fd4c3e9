"""The named methods: presets of curvature, cost, update and allocation.

Reference: van der Ouderaa et al. 2024, *The LLM Surgeon*, section 5 (`llm-surgeon`, `k-obd`, `l-obd`, `magnitude`); Sun
et al. 2024, *Wanda*, section 3; Frantar & Alistarh 2023, *SparseGPT*, section 3.
"""

from dataclasses import dataclass

from surgeon.choices import Allocation, Cost, Curvature, Method, UpdateRule
from surgeon.errors import ParameterError


@dataclass(frozen=True)
class Preset:
    """What a method decides.

    Attributes:
        curvature: the approximation.
        cost: what a removal costs.
        update: how the rest adapts.
        allocation: within what the cheapest are chosen.
        fixed: whether another curvature, cost or update would make it another method.
        weights_only: whether it is defined for single weights and N:M patterns only.
    """

    curvature: Curvature
    cost: Cost
    update: UpdateRule
    allocation: Allocation = Allocation.GLOBAL
    fixed: bool = True
    weights_only: bool = False


WITHOUT_CURVATURE = (Method.LAYERCHOP, Method.BONSAI)
"""Methods that measure no curvature, and adapt nothing while they prune."""

PRESETS: dict[Method, Preset] = {
    Method.MAGNITUDE: Preset(Curvature.IDENTITY, Cost.OBD, UpdateRule.NONE),
    Method.L_OBD: Preset(Curvature.ACTIVATIONS, Cost.OBD, UpdateRule.NONE),
    Method.K_OBD: Preset(Curvature.KFAC, Cost.OBD, UpdateRule.NONE),
    Method.LLM_SURGEON: Preset(Curvature.KFAC, Cost.OBS, UpdateRule.EXACT, fixed=False),
    Method.WANDA: Preset(Curvature.ACTIVATIONS, Cost.OBD, UpdateRule.NONE, Allocation.PER_ROW, weights_only=True),
    Method.SPARSEGPT: Preset(
        Curvature.ACTIVATIONS, Cost.OBS, UpdateRule.SEQUENTIAL, Allocation.PER_LAYER, weights_only=True
    ),
    Method.LAYERCHOP: Preset(Curvature.IDENTITY, Cost.OBD, UpdateRule.NONE),
    Method.BONSAI: Preset(Curvature.IDENTITY, Cost.OBD, UpdateRule.NONE),
}


def require_preset(method: Method, curvature: Curvature | None, cost: Cost | None, update: UpdateRule | None) -> Preset:
    """The preset of a method, after checking what is given against what it fixes.

    Raises:
        ParameterError: naming the value of the preset.
    """
    preset = PRESETS[method]
    if not preset.fixed:
        return preset
    for name, got, own in (
        ("curvature", curvature, preset.curvature),
        ("cost", cost, preset.cost),
        ("update", update, preset.update),
    ):
        if got is not None and method in WITHOUT_CURVATURE:
            raise ParameterError(f"{name}: {got} has no effect with method: {method}, which has none; leave it null")
        if got not in (None, own):
            raise ParameterError(
                f"{name}: got {got}, but method {method} is defined with {name}: {own}; leave it null, or choose "
                f"method: {Method.LLM_SURGEON}, where it is free"
            )
    return preset
