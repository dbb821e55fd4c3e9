"""Low-rank adapters for recovery: which linears get one, what of them is trained, and the weights they come to.

An adapter never revives what was removed: a linear computes ``x (W + M ∘ B A)ᵀ`` with the live weights ``M`` while it
is trained, and exactly that is merged. Rule: a linear of which nothing lives gets no adapter; asking by name for
linears that live nowhere is an error.

Reference:
    Hu et al. 2022 (LoRA), section 4.1.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgeon.correction.masked import MaskedAdapter, masked_adapters
from surgeon.errors import ParameterError
from surgeon.recovery.settings import RecoverySettings
from surgeon.text.suggest import did_you_mean

_START = 2
"""What is drawn from the seed beside the rows (`surgeon.recovery.packing`)."""


def adapted_linears(live: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Linears that get an adapter, with their live weights.

    Args:
        live: every linear of the blocks by its full name, `[n_out, n_in]` bool; empty for one that is gone.
        wanted: last parts of names ("q_proj"); none for all.

    Raises:
        ParameterError: nothing lives in any linear of a wanted name, or there is no such linear.
    """
    left = {name: mask for name, mask in live.items() if mask.numel() and bool(mask.any())}
    names = tuple(wanted)
    known = sorted({name.rpartition(".")[2] for name in live})
    for name in names:
        if name not in known:
            raise ParameterError(
                f"recovery.linears: the blocks have no linear {name!r}; allowed: {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
        if not any(full.rpartition(".")[2] == name for full in left):
            raise ParameterError(
                f"recovery.linears: {name!r} was removed from every block, so an adapter has nothing to adapt; "
                f"allowed: {', '.join(sorted({full.rpartition('.')[2] for full in left}))}"
            )
    chosen = {name: mask for name, mask in left.items() if not names or name.rpartition(".")[2] in names}
    if not chosen:
        raise ParameterError("recovery.method: lora has nothing to adapt: no weight of any block is left; use full")
    return chosen


@contextmanager
def recovery_adapters(
    model: PreTrainedModel, live: Mapping[str, Tensor], settings: RecoverySettings
) -> Iterator[dict[str, MaskedAdapter]]:
    """Puts adapters on the linears of a model in memory; at the end the model is as it was.

    Args:
        model: the pruned model.
        live: as `adapted_linears` gives it.
        settings: rank and seed.

    Yields:
        The adapters by the full name of their linear.
    """
    model.requires_grad_(False)
    seed = int(np.random.default_rng((settings.seed, _START)).integers(2**63))
    with masked_adapters(model, live, settings.rank, seed) as adapters:
        yield adapters


def adapter_parameters(adapters: Mapping[str, MaskedAdapter]) -> dict[str, nn.Parameter]:
    """What is trained, by name: "model.layers.0.mlp.up_proj.A" `[rank, n_in]` and "….B" `[n_out, rank]`."""
    pairs = {name: (adapter.a, adapter.b) for name, adapter in adapters.items()}
    return {f"{name}.{part}": p for name, pair in pairs.items() for part, p in zip("AB", pair, strict=True)}


def merged_weights(
    model: PreTrainedModel, adapters: Mapping[str, MaskedAdapter], live: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights with what the adapters add, by full name ("….up_proj.weight"), float32 on the CPU.

    What does not live keeps its bits.
    """
    merged = {}
    for name, adapter in adapters.items():
        wrapped = model.get_submodule(name)
        base: nn.Linear = wrapped.get_base_layer()  # type: ignore[operator]
        with torch.no_grad():
            weight = base.weight.detach().to("cpu", torch.float32)
            change = adapter.change().to("cpu", torch.float32)
            merged[f"{name}.weight"] = torch.where(live[name].cpu(), weight + change, weight)
    return merged
