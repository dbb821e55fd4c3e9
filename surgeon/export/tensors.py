"""The tensors of an export: which are written, in which shapes, and how each is made from the pruned model."""

from collections.abc import Callable, Iterable, Iterator
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


class ExportTensors:
    """Plans the tensors of each file; those of one block are in memory at a time.

    Args:
        plan: the export.

    Raises:
        ExportError: A pruned linear is not stored in the checkpoint.
    """

    def __init__(self, plan: ExportPlan) -> None:
        self.plan = plan
        self.tally = Tally()
        self._block: tuple[int, dict[str, Tensor]] | None = None
        weights = WeightFiles(plan.pruned.checkpoint)
        architecture = plan.dense.architecture
        self._parts: dict[str, _Part] = {}
        self._in_model: dict[str, str] = {}
        self._others = dict(plan.pruned.others)
        # Of tensors that are tied together, all that are stored are the one that has changed.
        for pair in plan.dense.skeleton.get_expanded_tied_weights_keys(all_submodels=True).items():
            for name, other in (pair, pair[::-1]):
                if other in plan.pruned.others:
                    self._others.setdefault(name, plan.pruned.others[other])
        for name in plan.dense.skeleton.state_dict():
            if (stored := weights.stored_name(name)) is not None:
                self._in_model[stored] = name
        for index, facts in enumerate(plan.blocks):
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
        part = self._parts.get(stored)
        if part is None:
            yield from self._kept(stored, read)
            return
        self._count(shape)
        layout = self.plan.layout.blocks[part.block].linears[part.linear]
        if self.plan.form is ExportLayout.DENSE:
            yield stored, self._pruned(part, shape)
            return
        attention_is_gone = self._is_of_gone_attention(self._in_model[stored])
        if part.kind == "bias":
            if layout.is_constant:
                yield stored, self._pruned(part, (len(layout.rows.seen),))
            elif not layout.is_gone:
                yield stored, self._pruned(part, layout.shape[:1])
        elif not layout.is_gone and not attention_is_gone:
            yield stored, self._pruned(part, layout.shape)
            for name, side in (("kept_outputs", layout.rows), ("kept_inputs", layout.columns)):
                if (index_map := side.index_map) is not None:
                    maps = TensorPlan(tuple(index_map.shape), torch.int64, partial(torch.Tensor.clone, index_map))
                    yield f"{stored.removesuffix('weight')}{name}", maps

    def _kept(self, stored: str, read: Callable[[], Tensor]) -> Iterator[tuple[str, TensorPlan]]:
        """A tensor that is no part of a pruned linear; it may have changed, or belong to an attention that is gone."""
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
        source = self._others.get(self._in_model.get(stored, stored), read)
        yield self._written_name(stored), TensorPlan(shape, dtype, lambda: source().to(dtype))

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
                facts, layout = self.plan.blocks[part.block], self.plan.layout.blocks[part.block]
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
        for index, block in enumerate(self.plan.layout.blocks):
            path = self.plan.dense.architecture.block_path(index)
            if block.n_kv_heads == 0 and name.startswith(f"{path}.{module}."):
                return name != f"{path}.{family.attention.output}.bias"
        return False

    def _written_name(self, stored: str) -> str:
        """Name in the files; transformers knows the other names that some families store by only in stock models."""
        if self.plan.form is not ExportLayout.COMPACT or stored not in self._in_model:
            return stored
        family = self.plan.dense.architecture.family
        renamed = family is not None and any(stored.startswith(in_files) for _, in_files in family.renamed)
        return self._in_model[stored] if renamed else stored


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
