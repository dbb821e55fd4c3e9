"""Low-rank adapters of peft on the linears of a pruned model, held inside its mask.

With the live weights ``M`` (0 or 1, `[n_out, n_in]`) a linear computes ``x (W + M ∘ s B A)ᵀ + b`` while it is trained,
``A`` `[rank, n_in]`, ``B`` `[n_out, rank]`, ``s`` the scale; exactly that is absorbed later.

Reference:
    Hu et al. 2022 (LoRA), section 4.1; van der Ouderaa et al. 2024 (LLM Surgeon), section 3.5.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from surgeon.models.skeleton import REGISTERING

_ADAPTER = "correction"
_SCALE = 1
"""``s``; it only rescales the steps, which AdamW makes independent of it up to the learning rate."""


class MaskedAdapter:
    """The adapter of one linear.

    Args:
        layer: peft's wrapper around the linear.
        live: weights that live, `[n_out, n_in]` bool, on the device of the linear.
    """

    def __init__(self, layer: Any, live: Tensor) -> None:
        self._layer = layer
        self._live = live
        self.a: nn.Parameter = layer.lora_A[_ADAPTER].weight
        self.b: nn.Parameter = layer.lora_B[_ADAPTER].weight
        rows, columns = live.any(dim=1), live.any(dim=0)
        if bool((live == (rows[:, None] & columns)).all()):
            self._confine(rows, columns)
        else:
            layer.forward = partial(_forward_masked, self, layer.get_base_layer())

    def start(self, generator: torch.Generator) -> None:
        """Draws ``A`` from a generator on the CPU and sets ``B`` to zero, so that training starts at the linear."""
        with torch.no_grad():
            drawn = torch.empty(self.a.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # as LoRA and nn.Linear start
            self.a.copy_(drawn * self._live.any(dim=0).to(drawn.device))
            self.b.zero_()

    def change(self) -> Tensor:
        """``M ∘ s B A``, `[n_out, n_in]` float32; carries a graph where gradients are on."""
        change: Tensor = self._layer.get_delta_weight(_ADAPTER)
        return torch.where(self._live, change, 0.0)

    def _confine(self, rows: Tensor, columns: Tensor) -> None:
        """Keeps removed rows of ``B`` and columns of ``A`` at zero: they start there and have no gradient.

        The product then lies in the mask by itself, and no matrix of the size of the weight is formed in training.
        """
        if not columns.all():
            self.a.register_hook(lambda gradient: gradient * columns)  # type: ignore[no-untyped-call]
        if not rows.all():
            self.b.register_hook(lambda gradient: gradient * rows[:, None])  # type: ignore[no-untyped-call]


def _forward_masked(adapter: MaskedAdapter, base: nn.Linear, x: Tensor) -> Tensor:
    """Stands in for the wrapper's forward where the mask has no low-rank form."""
    return linear(x, base.weight + adapter.change().to(base.weight.dtype), base.bias)


@contextmanager
def masked_adapters(
    model: PreTrainedModel, live: Mapping[str, Tensor], rank: int, seed: int
) -> Iterator[dict[str, MaskedAdapter]]:
    """Puts adapters on linears of a loaded model; at the end, also after an exception, the model is as it was.

    Args:
        model: its parameters must need no gradient; only the adapters' do.
        live: for each linear by its full name, `[n_out, n_in]` bool.
        rank: of the adapters.
        seed: of their start. The global generators are left as they are.

    Yields:
        The adapters by the full name of their linear.
    """
    linears = {name: model.get_submodule(name) for name in live}
    attributes = set(vars(model))
    try:
        _inject(model, list(linears), rank)
        generator = torch.Generator().manual_seed(seed)
        adapters = {}
        for name, linear_ in linears.items():
            adapters[name] = MaskedAdapter(model.get_submodule(name), live[name].to(_device(linear_)))
            adapters[name].start(generator)
        yield adapters
    finally:
        # Not peft's own unloading: that needs an injection that went through.
        for name, linear_ in linears.items():
            model.set_submodule(name, linear_)
        for added in set(vars(model)) - attributes:
            delattr(model, added)


def _inject(model: PreTrainedModel, names: list[str], rank: int) -> None:
    import peft  # here, because it is slow to import and few runs correct

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=_SCALE * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules="|".join(map(re.escape, names)),  # a string is a pattern for the whole name
    )
    # peft draws from the global generators, although what it draws is replaced.
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with REGISTERING, torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Adapters are float32 whatever the model is: steps of 1e-4 would vanish in the rounding of bfloat16.
        peft.LoraModel(model, config, _ADAPTER)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
