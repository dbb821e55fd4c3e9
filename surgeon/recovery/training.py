"""The loop that trains: batches in parts, clipping, AdamW with a schedule, and masks that hold.

A step adds up the gradients of its micro-batches, sets those of removed weights to zero, clips the norm of all and
takes a step of AdamW. Parameters are float32; passes run in bfloat16 where the device has it.

Reference:
    Loshchilov & Hutter 2019 (AdamW), algorithm 2; Pascanu et al. 2013, section 3.2 (clipping).
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgeon.choices import LossTerm
from surgeon.errors import NonFiniteError
from surgeon.passes.groups import batches
from surgeon.recovery.objective import Objective, logits_of, mean_next_token_loss, mixed_precision
from surgeon.recovery.packing import step_rows
from surgeon.recovery.schedule import rate_at
from surgeon.recovery.settings import RecoverySettings
from surgeon.recovery.state import TrainingState, read_state, write_state
from surgeon.repeatable import repeatable
from surgeon.shortage import memory_advice
from surgeon.text.tokenizers import TokenArray

StepProgress = Callable[["StepLoss"], None]


@dataclass(frozen=True)
class StepLoss:
    """What a step came to.

    Attributes:
        step: from 0.
        loss: weighted sum of the terms before the step, over the rows of its batch.
        terms: each term, not weighted.
        gradient_norm: of all parameters, before it is clipped.
    """

    step: int
    loss: float
    terms: Mapping[LossTerm, float]
    gradient_norm: float


def no_step_progress(_loss: StepLoss) -> None:
    """Shows nothing."""


class Trainer:
    """Trains some parameters of a model.

    Args:
        objective: the loss.
        parameters: what is trained, by name; all others must need no gradient. Those of the objective come on top.
        masks: of some parameters, which entries live, bool of their shape; the others are zero, and stay zero.
        settings: batches, rates, clipping.
        rows: `[n_rows, length]` token ids to train on.

    Attributes:
        parameters: all that is trained.
        step: steps taken.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        settings: RecoverySettings,
        rows: TokenArray,
    ) -> None:
        self._objective = objective
        self._settings = settings
        self._rows = rows
        self.parameters = {**parameters, **objective.extra}
        self.step = 0
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._optimizer = _optimizer(self.parameters, set(objective.extra), settings)
        self._device = next(iter(self.parameters.values())).device
        _require_masks_fit(self.parameters, masks)
        self._dead = {name: ~mask.to(self.parameters[name].device) for name, mask in masks.items() if not mask.all()}
        for name in self._dead:
            self._clear_removed(name)

    def run(self, n_steps: int, progress: StepProgress = no_step_progress) -> list[StepLoss]:
        """Takes some steps; returns the loss of each.

        Raises:
            NonFiniteError: the loss or the gradient of a step is not finite; nothing of that step was applied.
            MemoryShortageError: there is not enough memory.
        """
        losses = []
        with training_memory(), repeatable(self._device):
            for _ in range(n_steps):
                losses.append(self._one_step())
                self.step += 1
                progress(losses[-1])
        return losses

    def state(self, *, moments: bool = True) -> TrainingState:
        """A copy of where training is; without moments it cannot be gone on with."""
        self.require_masks_kept()
        return read_state(self.step, self.parameters, self._optimizer, moments=moments)

    def restore(self, state: TrainingState) -> None:
        """Goes back to a state, to the bit."""
        write_state(state, self.parameters, self._optimizer)
        self.step = state.step
        self.require_masks_kept()

    def require_masks_kept(self) -> None:
        """Checks that no removed weight has changed by a single bit.

        Raises:
            AssertionError: one has, which is an error of the program.
        """
        for name in self._dead:
            assert not self._removed_bits(name).any(), f"{name}: a removed weight has changed in training"

    def _clear_removed(self, name: str) -> None:
        """Makes -0.0 of removed weights 0.0, which AdamW leaves as it is."""
        parameter, dead = self.parameters[name], self._dead[name]
        if bool(parameter.detach()[dead].any()):
            raise ValueError(f"{name} has weights that are not zero where none lives")
        with torch.no_grad():
            parameter.masked_fill_(dead, 0.0)

    def _removed_bits(self, name: str) -> Tensor:
        """Bits of the removed entries of a parameter."""
        values = self.parameters[name].detach()[self._dead[name]]
        return values.view(torch.int64 if values.dtype is torch.float64 else torch.int32)

    def _one_step(self) -> StepLoss:
        settings = self._settings
        chosen = self._rows[step_rows(len(self._rows), self.step, settings)]
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[LossTerm, Tensor] = {}
        for part in batches(len(chosen), settings.micro_batch):
            share = (part.stop - part.start) / len(chosen)
            for term, value in self._backward(chosen[part], share).items():
                sums[term] = sums[term] + share * value if term in sums else share * value
        terms = {term: float(value) for term, value in sums.items()}
        loss = math.fsum(settings.terms[term] * value for term, value in terms.items())
        if not math.isfinite(loss):
            raise NonFiniteError(self._not_finite("the loss", loss))
        norm = self._clip()
        if not math.isfinite(norm):
            raise NonFiniteError(self._not_finite("the norm of the gradient", norm))
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(settings, self.step)
        self._optimizer.step()
        return StepLoss(self.step, loss, terms, norm)

    def _backward(self, rows: NDArray[np.int64], share: float) -> dict[LossTerm, Tensor]:
        """Adds the gradient of one micro-batch; returns its terms, detached, float64."""
        input_ids = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(self._device)
        with mixed_precision(self._device):
            terms = self._objective(input_ids)
            total = torch.stack([share * self._settings.terms[term] * value for term, value in terms.items()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return {term: value.detach().double() for term, value in terms.items()}

    def _clip(self) -> float:
        """Takes the gradients of removed weights out and bounds the norm of the rest; returns it before."""
        for name, dead in self._dead.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(dead, 0.0)
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), self._settings.clip))

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"{what} in step {self.step} of recovery is {value} (learning rate "
            f"{rate_at(self._settings, self.step):g}). Try a lower recovery.learning_rate or a longer "
            "recovery.warmup; finished segments are kept."
        )


def validation_loss(model: nn.Module, rows: TokenArray, micro_batch: int) -> float:
    """Mean next-token loss of held-out rows, nats per predicted token.

    Args:
        model: a causal language model in memory.
        rows: `[n_rows, length]` token ids.
        micro_batch: rows at a time.

    Raises:
        NonFiniteError: naming the first rows whose loss is not finite.
        MemoryShortageError: there is not enough memory.
    """
    device = next(model.parameters()).device
    total = 0.0
    with training_memory(), torch.no_grad(), mixed_precision(device):
        for part in batches(len(rows), micro_batch):
            input_ids = torch.from_numpy(np.ascontiguousarray(rows[part], dtype=np.int64)).to(device)
            loss = float(mean_next_token_loss(logits_of(model, input_ids), input_ids))
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of validation rows {part.start} to {part.stop - 1} is {loss}. Try a lower "
                    "recovery.learning_rate; finished segments are kept."
                )
            total += loss * (part.stop - part.start)
    return total / len(rows)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a model by name; tied ones once."""
    return dict(model.named_parameters())


def training_memory() -> AbstractContextManager[None]:
    """Turns an allocation that failed into a `MemoryShortageError` that says what to lower."""
    return memory_advice(
        "recovery",
        "Lower recovery.micro_batch (rows at a time), recovery.batch_tokens or recovery.length, or use "
        "recovery.method=lora, which has few moments to hold, or drop terms that need the dense model. Finished "
        "segments are kept: the same command goes on after the last.",
    )


def _optimizer(
    parameters: Mapping[str, nn.Parameter], undecayed: set[str], settings: RecoverySettings
) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) and parameters of the loss are not decayed."""
    matrices = [p for name, p in parameters.items() if p.ndim > 1 and name not in undecayed]
    others = [p for name, p in parameters.items() if p.ndim <= 1 or name in undecayed]
    groups = [(matrices, settings.weight_decay), (others, 0.0)]
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in groups if group],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def _require_masks_fit(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(mask.shape) or mask.dtype is not torch.bool:
            raise ValueError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; must be torch.bool {shape}")
