"""Which next tokens the loss of a calibration pass is taken for: those of the text, or draws from the model itself.

With draws from the model's softmax the mean of ``vec(g aᵀ) vec(g aᵀ)ᵀ`` is the Fisher matrix itself; with the tokens of
the text it is the empirical one. A draw depends on its seed, its sequence and its number and nothing else, so batches
and groups of blocks do not matter.

Reference: Kunstner et al. 2019, *Limitations of the Empirical Fisher Approximation*, section 2.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import Targets

_POSITIONS = 128
"""Positions whose distributions are held in float64 at a time."""


@dataclass(frozen=True)
class TokenTargets:
    """A choice of next tokens.

    Attributes:
        targets: those of the text, or draws.
        draws: backward passes for each sequence; 1 for those of the text.
        seed: of the draws; without meaning for those of the text.
    """

    targets: Targets = Targets.EMPIRICAL
    draws: int = 1
    seed: int = 0

    @property
    def sampled(self) -> bool:
        """Whether they are drawn."""
        return self.targets is Targets.SAMPLED

    @property
    def parameters(self) -> dict[str, str | int]:
        """What results depend on."""
        if not self.sampled:
            return {"targets": self.targets.value}
        return {"targets": self.targets.value, "draws": self.draws, "seed": self.seed}

    def next_tokens(self, logits: Tensor, input_ids: Tensor, first_sequence: int, draw: int) -> Tensor:
        """The tokens predicted at every position but the last, `[n_sequences, length - 1]`.

        Args:
            logits: `[n_sequences, length, n_vocabulary]`.
            input_ids: `[n_sequences, length]`.
            first_sequence: index of the first sequence among all.
            draw: number of the draw, from 0.
        """
        if not self.sampled:
            return input_ids[:, 1:].to(logits.device)
        drawn = []
        for offset, sequence in enumerate(logits.detach()[:, :-1]):
            generator = torch.Generator().manual_seed(draw_seed(self.seed, first_sequence + offset, draw))
            drawn.append(_draw(sequence, torch.rand(len(sequence), generator=generator, dtype=torch.float64)))
        return torch.stack(drawn)


EMPIRICAL = TokenTargets()
"""The next tokens of the text."""


def draw_seed(seed: int, sequence: int, draw: int) -> int:
    """Seed of the generator of one draw: 63 bits, unrelated for different arguments."""
    digest = hashlib.sha256(f"next tokens {seed} {sequence} {draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token for each position by inverting the distribution function: `[n_positions]` from as many numbers."""
    parts = []
    for some, numbers in zip(
        torch.split(logits, _POSITIONS), torch.split(uniform.to(logits.device), _POSITIONS), strict=True
    ):
        total = torch.softmax(some.double(), dim=-1).cumsum(dim=-1)
        # Tokens of no probability are never drawn: the function first exceeds the number at one that has some.
        found = torch.searchsorted(total, numbers[:, None] * total[:, -1:], right=True)[:, 0]
        parts.append(found.clamp(max=logits.shape[-1] - 1))
    return torch.cat(parts)
