"""Finding what is not finite without stopping a GPU for every linear of every batch.

To look at a number of a GPU, the processor waits for all that was sent to it. A `Watch` keeps one truth value for each
sequence of what it is shown on the device, and looks at all of them once, when a batch has ended.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgeon.errors import NonFiniteError


@dataclass(frozen=True)
class Address:
    """Where values come from, for the error message.

    Attributes:
        what: kind of values, for example "output gradient".
        block: for example "block 7".
        linear: its name.
        first_sequence: index of the first sequence of the batch.
    """

    what: str
    block: str
    linear: str
    first_sequence: int

    def error(self, finite: Tensor) -> NonFiniteError:
        """The error for the first sequence that is not finite; if all are, the sum over them is not.

        Args:
            finite: `[n_sequences]` bool.
        """
        bad = ~finite
        where = f"sequence {self.first_sequence + int(bad.nonzero()[0])}" if bad.any() else "the sum over sequences"
        return NonFiniteError(
            f"non-finite {self.what} in {self.block}, linear {self.linear}, {where}. The model or the calibration text "
            "makes its numbers overflow: try model.dtype float32 or bfloat16, or leave that sequence out with another "
            "seed."
        )


@dataclass
class Watch:
    """What a batch has shown so far, in the order in which it was computed."""

    _seen: list[tuple[Address, Tensor]] = field(default_factory=list)

    def note(self, address: Address, finite: Tensor, witness: Tensor) -> None:
        """Remembers whether the sequences and a number made of all of them are finite; looks at nothing.

        Args:
            address: of the values.
            finite: `[n_sequences]` bool.
            witness: a number.
        """
        self._seen.append((address, torch.cat([finite, torch.isfinite(witness).reshape(1)])))

    def end_batch(self) -> None:
        """Looks at all that was noted, and forgets it.

        Raises:
            NonFiniteError: naming the first place that is not finite.
        """
        seen, self._seen = self._seen, []
        if not seen or bool(torch.cat([finite for _, finite in seen]).all()):
            return
        address, finite = next((address, finite) for address, finite in seen if not finite.all())
        raise address.error(finite[:-1])


def finite_sequences(values: Tensor, n_sequences: int) -> Tensor:
    """Which sequences are finite, `[n_sequences]` bool.

    Some models (OPT) give a linear one row a token, not one matrix a sequence.
    """
    return torch.isfinite(values.reshape(n_sequences, -1)).all(dim=1)
