"""What each selector reads and how it goes about it, in one table."""

from dataclasses import dataclass
from enum import StrEnum

from surgeon.choices import Selector


class Reads(StrEnum):
    """The statistic that a selector starts from."""

    NOTHING = "nothing"
    """Positions alone."""
    SIMILARITY = "similarity"
    """How much blocks turn the hidden states."""
    SUB_LAYERS = "sub-layer-similarity"
    """The same for the attention and the MLP of each block."""
    LOSSES = "removal-losses"
    """The loss with each block left out."""
    COSTS = "block-cost"
    """A sum over the weights of each block."""


class LayerGranularity(StrEnum):
    """What goes as a whole: blocks, or the attention and the MLP of a block apart."""

    BLOCK = "block"
    SUB_LAYER = "sub-layer"


@dataclass(frozen=True)
class SelectorSpec:
    """How a selector works.

    Attributes:
        reads: what it starts from.
        protect_first: blocks at the beginning that never go, unless the user says otherwise.
        protect_last: likewise at the end.
        needs_grad: whether there is a backward pass.
        contiguous: whether the blocks that go adjoin.
        iterative: whether scores are taken again after every removal.
        granularity: what goes as a whole.
    """

    reads: Reads
    protect_first: int
    protect_last: int
    needs_grad: bool = False
    contiguous: bool = False
    iterative: bool = False
    granularity: LayerGranularity = LayerGranularity.BLOCK

    @property
    def needs_data(self) -> bool:
        """Whether calibration sequences are read."""
        return self.needs_grad or self.reads not in (Reads.NOTHING, Reads.COSTS)

    @property
    def is_pattern(self) -> bool:
        """Whether what goes follows from the number of blocks alone."""
        return self.reads is Reads.NOTHING


SPECS: dict[Selector, SelectorSpec] = {
    Selector.INPUT: SelectorSpec(Reads.NOTHING, 1, 1, contiguous=True),
    Selector.OUTPUT: SelectorSpec(Reads.NOTHING, 1, 1, contiguous=True),
    Selector.MIDDLE: SelectorSpec(Reads.NOTHING, 1, 1, contiguous=True),
    Selector.BOTH: SelectorSpec(Reads.NOTHING, 1, 1),
    Selector.MAX_GAP: SelectorSpec(Reads.NOTHING, 1, 1),
    Selector.DEEPEST: SelectorSpec(Reads.NOTHING, 0, 1, contiguous=True),
    Selector.BLOCK_INFLUENCE: SelectorSpec(Reads.SIMILARITY, 0, 0),
    Selector.ANGULAR: SelectorSpec(Reads.SIMILARITY, 0, 0, contiguous=True),
    Selector.SLEB: SelectorSpec(Reads.LOSSES, 1, 1, iterative=True),
    Selector.PERPLEXITY: SelectorSpec(Reads.LOSSES, 0, 0),
    Selector.TAYLOR: SelectorSpec(Reads.COSTS, 4, 2, needs_grad=True),
    Selector.MAGNITUDE: SelectorSpec(Reads.COSTS, 4, 2),
    Selector.LLM_DROP: SelectorSpec(Reads.SUB_LAYERS, 0, 0, granularity=LayerGranularity.SUB_LAYER),
    Selector.CURVATURE: SelectorSpec(Reads.COSTS, 0, 0, needs_grad=True),
}
"""Protected is what the papers protect: the "+" of Taylor+ and Mag+ is 4 and 2, SLEB's barriers 1 and 1.

Reference: Jha et al. 2023 (the first and the last block are kept); Song et al. 2024, *SLEB*; Kim et al. 2024,
*Shortened LLaMA*.
"""
