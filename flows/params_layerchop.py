"""The section `prune.layerchop`: which layers go whole, and how many."""

from typing import Annotated, Self

from pydantic import Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from flows.params_section import Integer, Positive, Section
from surgeon.choices import Selector
from surgeon.layers.spec import SPECS

_Count = Annotated[Integer, Field(ge=0)]


class LayerChopParams(Section):
    """How LayerChop chooses.

    Attributes:
        selector: how layers are chosen.
        blocks: how many blocks go (attentions and MLPs, with `llm-drop`); None goes by the target of `prune`.
        protect_first: blocks at the beginning that stay; None is the selector's own.
        protect_last: blocks at the end that stay; None is the selector's own.
        gradient: whether `curvature` counts the gradient of the loss; None is yes.
    """

    selector: Selector = Selector.BLOCK_INFLUENCE
    blocks: Positive | None = None
    protect_first: _Count | None = None
    protect_last: _Count | None = None
    gradient: StrictBool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gradient is not None and self.selector is not Selector.CURVATURE:
            raise PydanticCustomError(
                "no_effect",
                "layerchop.gradient has no effect with selector: {selector}, because it says whether the cost by "
                "curvature counts the gradient of the loss; leave it null or choose selector: curvature",
                {"selector": self.selector.value},
            )
        if self.protect_first is not None and self.selector in (Selector.OUTPUT, Selector.DEEPEST):
            raise PydanticCustomError(
                "no_effect",
                "layerchop.protect_first has no effect with selector: {selector}, which takes the last blocks that may "
                "go; leave it null or use protect_last",
                {"selector": self.selector.value},
            )
        if self.protect_last is not None and self.selector is Selector.INPUT:
            raise PydanticCustomError(
                "no_effect",
                "layerchop.protect_last has no effect with selector: input, which takes the first blocks that may go; "
                "leave it null or use protect_first",
            )
        return self

    @property
    def protected(self) -> tuple[int, int]:
        """How many blocks stay at the beginning and at the end."""
        own = SPECS[self.selector]
        first = own.protect_first if self.protect_first is None else self.protect_first
        last = own.protect_last if self.protect_last is None else self.protect_last
        return first, last

    @property
    def counts_gradient(self) -> bool:
        """Whether the gradient of the loss is measured: `taylor` is made of it."""
        if self.selector is Selector.TAYLOR:
            return True
        return self.selector is Selector.CURVATURE and self.gradient is not False
