"""The state of training as named arrays: all that is needed to go on with the same bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_FIRST, _SECOND, _PARAMETER = "first_moment", "second_moment", "parameter"


@dataclass(frozen=True)
class TrainingState:
    """Where training is.

    Attributes:
        step: steps taken.
        parameters: by name, on the CPU, of the type they are trained in.
        first_moments: of AdamW, likewise; empty before the first step, or where training is not gone on with.
        second_moments: likewise.
    """

    step: int
    parameters: Mapping[str, Tensor]
    first_moments: Mapping[str, Tensor]
    second_moments: Mapping[str, Tensor]

    @property
    def can_go_on(self) -> bool:
        """Whether the moments are there."""
        return len(self.first_moments) == len(self.parameters)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All of it by name, for a store: "parameter/model.norm.weight" say."""
        parts = {_PARAMETER: self.parameters, _FIRST: self.first_moments, _SECOND: self.second_moments}
        arrays = {f"{part}/{name}": t.numpy() for part, tensors in parts.items() for name, t in tensors.items()}
        return arrays | {"step": np.asarray([self.step], dtype=np.int64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "TrainingState":
        """The same from what `to_arrays` gave; other arrays are ignored."""

        def of(part: str) -> dict[str, Tensor]:
            start = f"{part}/"
            return {
                name.removeprefix(start): torch.from_numpy(array)
                for name, array in arrays.items()
                if name.startswith(start)
            }

        return cls(int(arrays["step"][0]), of(_PARAMETER), of(_FIRST), of(_SECOND))


def read_state(
    step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, moments: bool
) -> TrainingState:
    """Copies the state of parameters and of their AdamW to the CPU.

    Args:
        step: steps taken.
        parameters: by name.
        optimizer: AdamW over exactly these.
        moments: whether training will be gone on with; without them a state is a third as large.
    """
    found = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    has = moments and all("exp_avg" in each for each in found.values())
    return TrainingState(
        step,
        {name: _copied(parameter) for name, parameter in parameters.items()},
        {name: _copied(each["exp_avg"]) for name, each in found.items()} if has else {},
        {name: _copied(each["exp_avg_sq"]) for name, each in found.items()} if has else {},
    )


def write_state(state: TrainingState, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Puts a state in place: parameters, and where they are there, moments and steps of AdamW.

    Raises:
        ValueError: names or shapes are not those of the parameters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.parameters.items()}
    if shapes != given:
        wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise ValueError(f"the state is not one of these parameters; they differ in {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
            if state.can_go_on:
                # The fused AdamW counts its steps on the device of the parameter.
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step), dtype=torch.float32, device=parameter.device),
                    "exp_avg": state.first_moments[name].to(parameter.device, copy=True),
                    "exp_avg_sq": state.second_moments[name].to(parameter.device, copy=True),
                }


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
