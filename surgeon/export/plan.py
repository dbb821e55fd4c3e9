"""What an export will consist of: its form, its configuration and the layout of every block that is left."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.choices import ExportLayout
from surgeon.errors import ExportError, ParameterError
from surgeon.export.dead_code import BlockFacts, LiveSets
from surgeon.export.layout import Layout, block_layout
from surgeon.export.stock import DenseModel, base_config, has_shapes, stock_config
from surgeon.models import Checkpoint, build_skeleton, discover
from surgeon.models.checkpoint import CONFIG_NAME
from surgeon.models.compact import CLASS_PREFIX, FORMAT, MODELLING_NAME, PREFIX
from surgeon.models.depth import shorter_config
from surgeon.pruning.linear import PrunedLinear

INDEX_BYTES = 8


def _no_others(_block: int) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model: a checkpoint, and what became of the linears of its blocks.

    Attributes:
        checkpoint: the dense model.
        linears: the linears of a block by name, in module order; called for one block at a time.
        live: their live rows and columns alone, which is cheap.
        removed: indices of blocks that are gone whole; nothing is asked of them.
        others: tensors of a block that belong to no linear (norms, say) and have changed, by name within the block.
        trunk: tensors outside the blocks that have changed, by full name; of tied ones one is enough.
    """

    checkpoint: Checkpoint
    linears: Callable[[int], Mapping[str, PrunedLinear]]
    live: Callable[[int], LiveSets]
    removed: Sequence[int] = ()
    others: Callable[[int], Mapping[str, Tensor]] = _no_others
    trunk: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportPlan:
    """A pruned model and the form it will be written in.

    Attributes:
        pruned: the model.
        dense: it before pruning, without weights; its `config` has the blocks that are left alone.
        form: stock, compact or dense.
        why_not_stock: why there is no stock configuration; None if there is one or nothing is gone.
        config: content of `config.json`.
        layout: what is written of each block that is left; not looked at where the form is dense.
        blocks: for each block of the dense model, what its dead code depends on.
        dtype: of all float tensors.
    """

    pruned: PrunedModel
    dense: DenseModel
    form: ExportLayout
    why_not_stock: str | None
    config: Mapping[str, Any]
    layout: Layout
    blocks: Sequence[BlockFacts]
    dtype: torch.dtype

    @property
    def needs_code(self) -> bool:
        """Whether transformers needs `trust_remote_code` to load it."""
        return str(self.config.get("model_type", "")).startswith(PREFIX) or self.dense.brings_code


def plan_export(pruned: PrunedModel, dtype: str, asked: ExportLayout = ExportLayout.AUTO) -> ExportPlan:
    """Decides in which form a model is written.

    Args:
        pruned: the model.
        dtype: "float32", "bfloat16" or "float16".
        asked: the form wanted.

    Raises:
        ParameterError: it cannot be written in the form that was asked for.
        ExportError: the live sets are not those of this model, or no block is left.
    """
    whole = _open(pruned.checkpoint)
    n_blocks = whole.architecture.n_blocks
    kept = [index for index in range(n_blocks) if index not in pruned.removed]
    if not kept or not set(pruned.removed) <= set(range(n_blocks)):
        raise ExportError(
            f"blocks {', '.join(map(str, pruned.removed))} are to be left out of a model with {n_blocks} (from 0); at "
            "least one must stay; nothing was exported"
        )
    dense = _without_removed(whole, kept)
    facts = [block_facts(dense, index) for index in range(n_blocks)]
    layout = Layout(kept, [_laid_out(pruned, index, facts[index]) for index in kept])
    torch_dtype: torch.dtype = getattr(torch, dtype)
    form, config, reason = _decide(dense, layout, asked, torch_dtype, pruned.checkpoint)
    written = {**{name: value for name, value in config.items() if name != "torch_dtype"}, "dtype": dtype}
    return ExportPlan(pruned, dense, form, reason, written, layout, facts, torch_dtype)


def block_facts(dense: DenseModel, index: int) -> BlockFacts:
    """What the dead code of a block depends on besides its live sets."""
    architecture = dense.architecture
    has_bias = {
        name: architecture.linear(dense.skeleton, index, name).bias is not None
        for name in architecture.linear_names(index)
    }
    if architecture.couplings is None:
        return BlockFacts(None, has_bias, 0.0)
    couplings = architecture.couplings[index]
    parent = couplings.mlp.column_linear.rpartition(".")[0]
    at_zero = _activation_at_zero(architecture.block(dense.skeleton, index).get_submodule(parent))
    # Without the activation nothing is known of removed rows, so nothing follows from them.
    return BlockFacts(couplings if at_zero is not None else None, has_bias, at_zero or 0.0)


def _activation_at_zero(mlp: nn.Module) -> float | None:
    """What the activation of an MLP makes of zero; None if the module has none under a usual name."""
    for name, child in mlp.named_children():
        if name.startswith("act") and not any(True for _ in child.parameters()):
            with torch.no_grad():
                return float(child(torch.zeros(1)))
    return None


def _open(checkpoint: Checkpoint) -> DenseModel:
    config = json.loads((checkpoint.path / CONFIG_NAME).read_text(encoding="utf-8"))
    skeleton = build_skeleton(checkpoint, torch.float32)
    is_ours = str(config.get("model_type", "")).startswith(PREFIX)
    brings_code = checkpoint.trust_remote_code and "auto_map" in config and not is_ours
    return DenseModel(config, skeleton, discover(skeleton), brings_code)


def _without_removed(whole: DenseModel, kept: Sequence[int]) -> DenseModel:
    """The same model with the configuration of what is left of it."""
    if len(kept) == whole.architecture.n_blocks:
        return whole
    described = whole.skeleton.config.get_text_config(decoder=True).to_dict()
    return replace(whole, config=shorter_config(whole.config, described, whole.architecture.n_blocks, kept))


def _laid_out(pruned: PrunedModel, index: int, facts: BlockFacts) -> Any:
    live = pruned.live(index)
    if set(live) != set(facts.has_bias):
        raise ExportError(
            f"block {index} has the linears {', '.join(facts.has_bias)}, but what was pruned is {', '.join(live)}; "
            "nothing was exported"
        )
    return block_layout(live, facts)


def _decide(
    dense: DenseModel, layout: Layout, asked: ExportLayout, dtype: torch.dtype, checkpoint: Checkpoint
) -> tuple[ExportLayout, Mapping[str, Any], str | None]:
    """Form, configuration, and why it is not stock."""
    is_whole = layout.is_dense and len(layout.kept) == dense.architecture.n_blocks
    if asked is ExportLayout.DENSE or (asked is ExportLayout.AUTO and is_whole):
        return ExportLayout.DENSE, dense.config, None
    reason = None
    if asked in (ExportLayout.AUTO, ExportLayout.STOCK):
        stock, reason = _stock(dense, layout)
        if stock is not None:
            return ExportLayout.STOCK, stock, None
        if asked is ExportLayout.STOCK:
            raise ParameterError(
                f"export.layout: no configuration of stock transformers describes this pruned model: {reason}. Use "
                "auto or compact (loaded with surgeon.load or trust_remote_code), or dense (same shapes, with zeros)"
            )
    if dense.brings_code:
        if asked is ExportLayout.COMPACT:
            raise ParameterError(
                f"export.layout: compact is not possible for {checkpoint.source}, whose own Python files build the "
                "model; use dense"
            )
        return ExportLayout.DENSE, dense.config, reason
    if asked is ExportLayout.AUTO and _saved_bytes(layout, dtype) <= 0:
        return ExportLayout.DENSE, dense.config, f"{reason}; with index maps it would not be smaller either"
    return ExportLayout.COMPACT, _compact_config(dense, layout), reason


def _stock(dense: DenseModel, layout: Layout) -> tuple[dict[str, Any] | None, str]:
    if dense.brings_code:
        return None, "its own Python files build it"
    shapes = _written_shapes(dense, layout)
    if layout.is_dense and has_shapes(dense.config, shapes):
        return dict(dense.config), ""
    if dense.architecture.couplings is None or any(block.n_neurons is None for block in layout.blocks):
        return None, "it is not known which rows and columns belong together in it"
    reason = layout.not_uniform
    if reason is not None:
        return None, reason
    first = layout.blocks[0]
    found = stock_config(dense, first, layout.kept, shapes)
    kind = base_config(dense.config).get("model_type")
    return found, f"{kind} ties the number of heads to the width, and {first.n_query_heads} heads are left"


def _written_shapes(dense: DenseModel, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name of every tensor of the smaller model, its blocks numbered anew → the shape it will have."""
    architecture = dense.architecture
    inside = f"{architecture.blocks_path}."
    tensors = {name: tuple(tensor.shape) for name, tensor in dense.skeleton.state_dict().items()}
    shapes = {name: shape for name, shape in tensors.items() if not name.startswith(inside)}
    for position, (index, block) in enumerate(zip(layout.kept, layout.blocks, strict=True)):
        before, path = f"{architecture.block_path(index)}.", architecture.block_path(position)
        mine = {name: shape for name, shape in tensors.items() if name.startswith(before)}
        shapes |= {f"{path}.{name.removeprefix(before)}": shape for name, shape in mine.items()}
        for name, linear in block.linears.items():
            shapes[f"{path}.{name}.weight"] = linear.shape
            if linear.has_bias:
                shapes[f"{path}.{name}.bias"] = linear.shape[:1]
    return shapes


def _saved_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of weights that are not written, less those of index maps."""
    maps = sum(
        len(side.stored)
        for block in layout.blocks
        for linear in block.linears.values()
        for side in (linear.rows, linear.columns)
        if linear.has_maps and side.index_map is not None
    )
    return sum(block.n_gone for block in layout.blocks) * dtype.itemsize - maps * INDEX_BYTES


def _compact_config(dense: DenseModel, layout: Layout) -> dict[str, Any]:
    """The configuration of the compact form: that of the dense model and a description of what is left."""
    base, before = base_config(dense.config), dense.config.get("pruned")
    family = dense.architecture.family
    attention = before["attention"] if before else None
    if family is not None and all(block.n_kv_heads is not None for block in layout.blocks):
        module, _, output = family.attention.output.rpartition(".")
        attention = {"module": module, "output": output}
    layers = []
    for position, block in enumerate(layout.blocks):
        earlier = before["layers"][position] if before else {"heads": None, "linears": {}}
        heads = earlier["heads"] if block.n_kv_heads is None else [block.n_query_heads, block.n_kv_heads]
        linears = {name: linear.sizes for name, linear in block.linears.items()}
        layers.append({"heads": heads, "linears": {**earlier["linears"], **linears}})
    model_name, config_name = (
        type(part).__name__.removeprefix(CLASS_PREFIX) for part in (dense.skeleton, dense.skeleton.config)
    )
    module = MODELLING_NAME.removesuffix(".py")
    return {
        **base,
        "model_type": f"{PREFIX}{base['model_type']}",
        "architectures": [f"{CLASS_PREFIX}{model_name}"],
        "auto_map": {
            "AutoConfig": f"{module}.{CLASS_PREFIX}{config_name}",
            "AutoModelForCausalLM": f"{module}.{CLASS_PREFIX}{model_name}",
        },
        "pruned": {
            "format": FORMAT,
            "blocks": dense.architecture.blocks_path,
            "attention": attention,
            "layers": layers,
        },
    }
