"""How much memory training takes at its peak, by what for: estimated from shapes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

_GIB = 2**30
_FLOAT32 = 4
_HEAD_COPIES = 4
"""Logits of a micro-batch in float32: as computed, their log-softmax, and the gradients of both."""
_TEACHER_HEAD_COPIES = 3
_ACTIVATION_COPIES = 2.0
"""What is held for the backward pass, over inputs and outputs of all linears: also norms, products and attention."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a step.

    Attributes:
        weights: of the model that is trained.
        gradients: of what is trained.
        moments: of AdamW, two for each weight that is trained.
        activations: of a micro-batch, of all blocks.
        logits: of a micro-batch.
        teacher: weights and logits of the dense model; 0 without.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    teacher: int

    @property
    def total_gib(self) -> float:
        """Sum, GiB."""
        n_bytes: int = sum(asdict(self).values())
        return n_bytes / _GIB

    def to_json(self) -> dict[str, float]:
        """Each part in GiB."""
        return {f"{name}_gib": value / _GIB for name, value in asdict(self).items()}

    @classmethod
    def of(
        cls,
        blocks: Sequence[Sequence[tuple[int, int]]],
        *,
        n_parameters: int,
        n_trained: int,
        n_vocabulary: int,
        micro_tokens: int,
        n_teacher: int,
    ) -> "TrainingMemory":
        """Estimates from shapes; parameters are float32.

        Args:
            blocks: for each block, `(n_out, n_in)` of its linears.
            n_parameters: of the model.
            n_trained: of them, or of adapters, what is trained.
            n_vocabulary: rows of the head.
            micro_tokens: tokens of a micro-batch.
            n_teacher: parameters of the dense model; 0 where it is not used.
        """
        sides = sum(n_out + n_in for block in blocks for n_out, n_in in block)
        logits = micro_tokens * n_vocabulary * _FLOAT32
        return cls(
            weights=n_parameters * _FLOAT32,
            gradients=n_trained * _FLOAT32,
            moments=2 * n_trained * _FLOAT32,
            activations=round(_ACTIVATION_COPIES * micro_tokens * sides * _FLOAT32),
            logits=_HEAD_COPIES * logits,
            teacher=(n_teacher * _FLOAT32 + _TEACHER_HEAD_COPIES * logits) if n_teacher else 0,
        )
