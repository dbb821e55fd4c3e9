"""A pruned model as a whole in memory, as small as what is left of it.

Removed blocks are not in its list of blocks. Where all that a block lost are whole units (MLP neurons, key/value
groups, all of an attention or an MLP), its linears have the sizes that are left. Other blocks keep the shapes of the
dense model with zeros, and a mask says which. So passes and training cost what the smaller model costs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgeon.models import Architecture, BlockCouplings
from surgeon.models.compact import Constant, WithoutHeads, set_heads
from surgeon.models.depth import per_layer_changes
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.pruning.linear import LiveSet
from surgeon.pruning.units import Shape, SubLayer, SubLayerKind, sub_layers


@dataclass(frozen=True)
class _Place:
    """Where what is left of a linear was: rows and columns of the dense one, int64."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class ShrunkModel:
    """A pruned model in memory.

    Attributes:
        model: of transformers, in evaluation mode, without cache; its parameters need no gradient.
        blocks: for each of its blocks the index in the dense model, ascending.
        masks: full name of a parameter of `model` → which of its numbers live, bool, on the device of the model; for
            those parameters alone that hold removed numbers, as zeros.
        architecture: of the dense model.
    """

    model: PreTrainedModel
    blocks: tuple[int, ...]
    masks: dict[str, Tensor]
    architecture: Architecture
    _places: dict[int, dict[str, _Place]]
    _dense: dict[int, dict[str, tuple[int, ...]]]

    def path(self, block: int) -> str:
        """Dotted path in `model` of a block by its index in the dense model."""
        return f"{self.architecture.blocks_path}.{self.blocks.index(block)}"

    def linear(self, block: int, name: str) -> nn.Module:
        """What is left of a linear, by the index of its block in the dense model and its name within the block.

        An `nn.Linear`, or a `Constant` where no weight is left.
        """
        parent, _, last = name.rpartition(".")
        owner = self.model.get_submodule(f"{self.path(block)}.{parent}".removesuffix("."))
        if isinstance(owner, WithoutHeads) and last != owner.output_name:
            return Constant(0, False)
        return owner.get_submodule(last)

    def restored(self, block: int) -> dict[str, Tensor]:
        """The tensors of a block in the shapes of the dense model, zero where something was removed.

        Returns:
            Name within the block → float32 tensor on the CPU. Tensors of modules that are gone as a whole and belong to
            no linear (a norm inside an attention) are left out.
        """
        module = self.model.get_submodule(self.path(block))
        current = {name: tensor.detach() for name, tensor in module.named_parameters()}
        places = self._places[block]
        result: dict[str, Tensor] = {}
        for name, shape in self._dense[block].items():
            owner, _, part = name.rpartition(".")
            value = current.get(name)
            if owner not in places:
                if value is not None:
                    result[name] = value.to("cpu", torch.float32)
                continue
            result[name] = torch.zeros(shape)
            if value is not None and value.numel():
                place = places[owner]
                value = value.to("cpu", torch.float32)
                if part == "weight":
                    result[name][place.rows[:, None], place.columns] = value
                else:
                    result[name][place.rows] = value
        return result

    def trunk(self) -> dict[str, Tensor]:
        """The parameters outside the blocks by full name, tied ones once; float32 on the CPU."""
        inside = f"{self.architecture.blocks_path}."
        named = self.model.named_parameters()
        return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in named if not n.startswith(inside)}


def shrink(model: BlockwiseModel, live: Callable[[int], Mapping[str, LiveSet]]) -> ShrunkModel:
    """Loads all that is left of a model, one block after the other.

    Args:
        model: opened block-wise, nothing loaded; it is used up.
        live: block → what lives of each of its linears.
    """
    architecture = model.architecture
    kept = tuple(index for index in range(model.n_blocks) if index not in model.removed)
    masks: dict[str, Tensor] = {}
    places: dict[int, dict[str, _Place]] = {}
    dense: dict[int, dict[str, tuple[int, ...]]] = {}
    for position, index in enumerate(kept):
        block, sets = model.block(index), live(index)
        dense[index] = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        model.load(index)
        couplings = None if architecture.couplings is None else architecture.couplings[index]
        units = None if couplings is None else _whole_units(couplings, sets)
        if couplings is not None and units is not None:
            places[index] = _cut(block, couplings, sets, units)
        else:
            places[index] = {
                n: _Place(*(torch.arange(len(part)) for part in (s.rows, s.columns))) for n, s in sets.items()
            }
            found = _masks(block, f"{architecture.blocks_path}.{position}", sets)
            masks |= {name: mask.to(model.device) for name, mask in found.items()}
    _drop_blocks(model, kept)
    return ShrunkModel(model.model, kept, masks, architecture, places, dense)


def _whole(live: LiveSet) -> _Place:
    return _Place(torch.arange(len(live.rows)), torch.arange(len(live.columns)))


def _whole_units(couplings: BlockCouplings, sets: Mapping[str, LiveSet]) -> dict[SubLayerKind, Tensor] | None:
    """Which units of the attention and the MLP live, bool; None if something else than whole units is gone."""
    if any(live.weights is not None for live in sets.values()):
        return None
    subs = sub_layers(couplings, {name: Shape(len(s.rows), len(s.columns), False) for name, s in sets.items()})
    described = {name for sub in subs for name in (*sub.rows, sub.output)}
    if not all(live.alive().all() for name, live in sets.items() if name not in described):
        return None
    units = {sub.kind: sub.live_units(sets[sub.output].columns) for sub in subs}
    return units if all(_is_whole(sub, units[sub.kind], sets) for sub in subs) else None


def _is_whole(sub: SubLayer, units: Tensor, sets: Mapping[str, LiveSet]) -> bool:
    """Whether a sub-layer has lost just the units that are gone; one without any may lack its other side too."""
    for name, (rows, columns) in sub.live_parts(units).items():
        for found, wanted in ((sets[name].rows, rows), (sets[name].columns, columns)):
            if wanted is None and units.any() and not found.all():
                return False
            if wanted is not None and not torch.equal(found, wanted):
                return False
    return True


def _cut(
    block: nn.Module, couplings: BlockCouplings, sets: Mapping[str, LiveSet], units: Mapping[SubLayerKind, Tensor]
) -> dict[str, _Place]:
    """Gives the linears of a block the sizes that are left; returns where their rows and columns were."""
    places = {}
    for name, live in sets.items():
        place = _Place(live.rows.nonzero().flatten(), live.columns.nonzero().flatten())
        places[name] = place
        parent, _, last = name.rpartition(".")
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(block.get_submodule(parent), last, _smaller(linear, place))
    attention = couplings.attention
    module, _, output = attention.output.rpartition(".")
    n_groups = int(units[SubLayerKind.ATTENTION].sum())
    set_heads(block, module, output, n_groups * attention.n_query_heads // attention.n_kv_heads, n_groups)
    return places


def _smaller(linear: nn.Linear, place: _Place) -> nn.Module:
    n_out, n_in = linear.weight.shape
    rows, columns = place.rows.to(linear.weight.device), place.columns.to(linear.weight.device)
    if len(rows) == n_out and len(columns) == n_in:
        return linear
    if len(rows) == 0 or len(columns) == 0:
        # Rows that nothing reads are none; an output linear whose columns are gone still gives its bias, or zero.
        is_input = len(rows) == 0 and len(columns) > 0
        constant = Constant(0 if is_input else n_out, linear.bias is not None and len(rows) == n_out)
        if constant.bias is not None and linear.bias is not None:
            constant.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return constant
    with torch.device("meta"):
        smaller = nn.Linear(len(columns), len(rows), bias=linear.bias is not None, dtype=linear.weight.dtype)
    smaller.weight = nn.Parameter(linear.weight.detach()[rows][:, columns].contiguous(), requires_grad=False)
    if linear.bias is not None:
        smaller.bias = nn.Parameter(linear.bias.detach()[rows].clone(), requires_grad=False)
    return smaller


def _masks(block: nn.Module, path: str, sets: Mapping[str, LiveSet]) -> dict[str, Tensor]:
    """Masks of the parameters of a block that hold removed numbers, by full name."""
    masks = {}
    for name, live in sets.items():
        alive = live.alive()
        if not alive.all():
            masks[f"{path}.{name}.weight"] = alive
        linear: Any = block.get_submodule(name)
        if linear.bias is not None and not live.rows.all():
            masks[f"{path}.{name}.bias"] = live.rows
    return masks


def _drop_blocks(model: BlockwiseModel, kept: tuple[int, ...]) -> None:
    """Takes removed blocks out of the list, and makes the configuration fit what is left."""
    if len(kept) == model.n_blocks:
        return
    path, module = model.architecture.blocks_path, model.model
    blocks = nn.ModuleList([model.block(index) for index in kept])
    module.set_submodule(path, blocks)
    config: Any = module.config.get_text_config(decoder=True)
    for name, value in per_layer_changes(config.to_dict(), model.n_blocks, kept).items():
        setattr(config, name, value)
    for position, block in enumerate(blocks):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = position  # type: ignore[assignment]
