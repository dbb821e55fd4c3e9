"""The tensors of an export: which are written, in which shapes, and how each is made from the pruned model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from surgeon.choices import ExportLayout
from surgeon.errors import ExportError
from surgeon.export.layout import BlockLayout, LinearLayout
from surgeon.export.plan import ExportPlan
from surgeon.export.safetensors_stream import TensorPlan
from surgeon.models import WeightFiles
from surgeon.models.checkpoint import find_weight_files
from surgeon.pruning.linear import PrunedLinear


@dataclass
class Tally:
    """What is counted while tensors are planned and made.

    Attributes:
        parameters_dense: numbers in the float tensors of the dense checkpoint.
        parameters: numbers in those that are written.
        bytes_dense: bytes of the dense tensors in the dtype of the export.
        live: block → weights of its linears that pruning left.
    """

    parameters_dense: int = 0
    parameters: int = 0
    bytes_dense: int = 0
    live: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A tensor of a pruned linear."""

    block: int
    linear: str
    kind: str


@dataclass(frozen=True)
class _Changed:
    """A tensor that is none of a linear and has changed: its shape, and where it is."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class ExportTensors:
    """Plans the tensors of each file; those of one block are in memory at a time.

    Args:
        plan: the export.

    Raises:
        ExportError: A pruned linear is not stored in the checkpoint, or another changed tensor does not fit it.
    """

    def __init__(self, plan: ExportPlan) -> None:
        self.plan = plan
        self.tally = Tally()
        self._block: tuple[int, dict[str, Tensor]] | None = None
        weights = WeightFiles(plan.pruned.checkpoint)
        architecture = plan.dense.architecture
        self._parts: dict[str, _Part] = {}
        self._in_model: dict[str, str] = {}
        for name in plan.dense.skeleton.state_dict():
            if (stored := weights.stored_name(name)) is not None:
                self._in_model[stored] = name
        self._numbering = _Numbering(plan, self._in_model)
        self._changed = _changed(plan)
        for index in plan.layout.kept:
            facts = plan.blocks[index]
            for linear, has_bias in facts.has_bias.items():
                for kind in ("weight", "bias") if has_bias else ("weight",):
                    name = f"{architecture.block_path(index)}.{linear}.{kind}"
                    stored = weights.stored_name(name)
                    if stored is None:
                        raise ExportError(
                            f"{plan.pruned.checkpoint.path} has no tensor {name!r} to be replaced; nothing was exported"
                        )
                    self._parts[stored] = _Part(index, linear, kind)

    def files(self) -> Iterator[tuple[Path, dict[str, TensorPlan]]]:
        """Each weight file of the checkpoint with the tensors of the one that takes its place, which may be none."""
        for file in find_weight_files(self.plan.pruned.checkpoint.path):
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                plans: dict[str, TensorPlan] = {}
                for stored in sorted(names, key=self._order):
                    shape = tuple(opened.get_slice(stored).get_shape())
                    for name, tensor in self._planned(stored, shape, partial(opened.get_tensor, stored)):
                        plans[name] = tensor
                yield file, plans

    def _order(self, stored: str) -> tuple[int, str]:
        part = self._parts.get(stored)
        return (-1 if part is None else part.block, stored)

    def _planned(
        self, stored: str, shape: tuple[int, ...], read: Callable[[], Tensor]
    ) -> Iterator[tuple[str, TensorPlan]]:
        written = self._written_name(stored)
        if written is None:
            if read().is_floating_point():
                self._count(shape)
            return
        part = self._parts.get(stored)
        if part is None:
            yield from self._kept(stored, written, read)
            return
        self._count(shape)
        if self.plan.form is ExportLayout.DENSE:
            yield written, self._pruned(part, shape)
            return
        layout = self.plan.layout.of(part.block).linears[part.linear]
        attention_is_gone = self._is_of_gone_attention(self._in_model[stored])
        if part.kind == "bias":
            if layout.is_constant:
                yield written, self._pruned(part, (len(layout.rows.seen),))
            elif not layout.is_gone:
                yield written, self._pruned(part, layout.shape[:1])
        elif not layout.is_gone and not attention_is_gone:
            yield written, self._pruned(part, layout.shape)
            for name, side in (("kept_outputs", layout.rows), ("kept_inputs", layout.columns)):
                if (index_map := side.index_map) is not None:
                    maps = TensorPlan(tuple(index_map.shape), torch.int64, partial(torch.Tensor.clone, index_map))
                    yield f"{written.removesuffix('weight')}{name}", maps

    def _kept(self, stored: str, written: str, read: Callable[[], Tensor]) -> Iterator[tuple[str, TensorPlan]]:
        """A tensor of no linear, as it was or as it has become; it may belong to an attention that is gone."""
        tensor = read()  # memory-mapped
        is_float = tensor.is_floating_point()
        if is_float:
            self._count(tuple(tensor.shape))
        if self._is_of_gone_attention(self._in_model.get(stored, stored)):
            return
        dtype = self.plan.dtype if is_float else tensor.dtype
        if is_float:
            self.tally.parameters += tensor.numel()
        shape = tuple(tensor.shape)
        del tensor
        changed = self._changed.get(self._in_model.get(stored, stored))
        if changed is not None and changed.shape != shape:
            raise ExportError(
                f"{stored} has the shape {list(shape)}, but what has become of it {list(changed.shape)}; nothing was "
                "exported"
            )
        make = read if changed is None else changed.read
        yield written, TensorPlan(shape, dtype, lambda: make().to(dtype))

    def _count(self, shape: tuple[int, ...]) -> None:
        n = int(torch.Size(shape).numel())
        self.tally.parameters_dense += n
        self.tally.bytes_dense += n * self.plan.dtype.itemsize

    def _pruned(self, part: _Part, shape: tuple[int, ...]) -> TensorPlan:
        self.tally.parameters += int(torch.Size(shape).numel())
        return TensorPlan(shape, self.plan.dtype, lambda: self._made(part).to(self.plan.dtype))

    def _made(self, part: _Part) -> Tensor:
        if self._block is None or self._block[0] != part.block:
            self._block = None
            linears = self.plan.pruned.linears(part.block)
            self.tally.live[part.block] = sum(linear.n_live_weights for linear in linears.values())
            if self.plan.form is ExportLayout.DENSE:
                self._block = (part.block, _dense_tensors(linears.items()))
            else:
                facts, layout = self.plan.blocks[part.block], self.plan.layout.of(part.block)
                couplings = facts.couplings
                down = couplings.mlp.column_linear if couplings is not None else ""
                self._block = (part.block, _smaller_tensors(linears.items(), layout, down, facts.at_zero))
        return self._block[1][f"{part.linear}.{part.kind}"]

    def _is_of_gone_attention(self, name: str) -> bool:
        """Whether a tensor belongs to an attention that is gone, the bias of its output linear left out."""
        family = self.plan.dense.architecture.family
        if family is None or self.plan.form is not ExportLayout.COMPACT:
            return False
        module, _, _ = family.attention.output.rpartition(".")
        for index, block in zip(self.plan.layout.kept, self.plan.layout.blocks, strict=True):
            path = self.plan.dense.architecture.block_path(index)
            if block.n_kv_heads == 0 and name.startswith(f"{path}.{module}."):
                return name != f"{path}.{family.attention.output}.bias"
        return False

    def _written_name(self, stored: str) -> str | None:
        """Name in the files, with the new number of its block; None if the block is gone.

        transformers knows the other names that some families store by only in stock models.
        """
        name = stored
        if self.plan.form is ExportLayout.COMPACT and stored in self._in_model:
            family = self.plan.dense.architecture.family
            renamed = family is not None and any(stored.startswith(in_files) for _, in_files in family.renamed)
            name = self._in_model[stored] if renamed else stored
        return self._numbering.renumbered(name)


class _Numbering:
    """The numbers of blocks in names, which change where blocks before them are gone.

    Args:
        plan: the export.
        in_model: name in the files → name in the model.
    """

    def __init__(self, plan: ExportPlan, in_model: Mapping[str, str]) -> None:
        architecture, kept = plan.dense.architecture, list(plan.layout.kept)
        self._new: dict[str, str | None] = {}
        if len(kept) == architecture.n_blocks:
            return
        inside = f"{architecture.blocks_path}."
        for names in in_model.items():
            if not names[1].startswith(inside):
                continue
            number, _, rest = names[1].removeprefix(inside).partition(".")
            index = int(number)
            for name in names:  # with all that comes before the number, which may differ in the files
                before = name.removesuffix(f"{number}.{rest}")
                new = f"{before}{kept.index(index)}." if index in kept else None
                self._new[f"{before}{number}."] = new

    def renumbered(self, name: str) -> str | None:
        """The new name of a tensor, which the model may not have; None if its block is gone."""
        for prefix, new in self._new.items():
            if name.startswith(prefix):
                return None if new is None else new + name.removeprefix(prefix)
        return name


def _changed(plan: ExportPlan) -> dict[str, _Changed]:
    """Changed tensors of no linear, by name in the model; of tied ones all names."""
    found: dict[str, _Changed] = {}
    for index in plan.layout.kept:
        for name, tensor in plan.pruned.others(index).items():
            read = partial(_other, plan.pruned.others, index, name)
            found[f"{plan.dense.architecture.block_path(index)}.{name}"] = _Changed(tuple(tensor.shape), read)
    for name, tensor in plan.pruned.trunk.items():
        found[name] = _Changed(tuple(tensor.shape), partial(torch.Tensor.detach, tensor))
    known = set(plan.dense.skeleton.state_dict())
    if unknown := set(found) - known:
        raise ExportError(
            f"{plan.pruned.checkpoint.path} has no tensor {min(unknown)!r} to be replaced; nothing was exported"
        )
    for pair in plan.dense.skeleton.get_expanded_tied_weights_keys(all_submodels=True).items():
        for one, other in (pair, pair[::-1]):
            if one in found:
                found.setdefault(other, found[one])
    return found


def _other(others: Callable[[int], Mapping[str, Tensor]], index: int, name: str) -> Tensor:
    return others(index)[name]


def _dense_tensors(linears: Iterable[tuple[str, PrunedLinear]]) -> dict[str, Tensor]:
    tensors = {}
    for name, linear in linears:
        tensors[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias
    return tensors


def _smaller_tensors(
    linears: Iterable[tuple[str, PrunedLinear]], block: BlockLayout, down: str, at_zero: float
) -> dict[str, Tensor]:
    tensors = {}
    for name, linear in linears:
        layout = block.linears[name]
        weight, bias = linear.weight.cpu(), None if linear.bias is None else linear.bias.cpu()
        if name == down and bias is not None and block.folded is not None and len(block.folded):
            bias = bias + at_zero * weight[:, block.folded].sum(dim=1)
        tensors[f"{name}.weight"] = weight[layout.rows.stored][:, layout.columns.stored]
        if bias is not None:
            tensors[f"{name}.bias"] = bias[_bias_rows(layout)]
    return tensors


def _bias_rows(layout: LinearLayout) -> Tensor:
    """Rows whose bias is written: all that is seen of a constant, whose removed rows have a bias of zero."""
    return layout.rows.seen if layout.is_constant else layout.rows.stored
