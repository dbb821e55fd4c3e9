"""Finds the decoder blocks of a model, their linears and what is coupled in them, without code of any one model."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgeon.errors import ModelError
from surgeon.models.compact import Constant, IndexedLinear
from surgeon.models.families import AttentionCoupling, Family, MlpCoupling, QkvLayout, family_names, find_family


@dataclass(frozen=True)
class BlockCouplings:
    """What must be removed together in one block."""

    mlp: MlpCoupling
    attention: AttentionCoupling


@dataclass(frozen=True)
class Architecture:
    """The structure of a model as far as pruning needs it; holds names and numbers, no tensors.

    Attributes:
        blocks_path: Dotted path of the list of blocks, such as `model.layers`.
        n_blocks: Number of blocks.
        linears: For each block the dotted names of its linears relative to the block, in module order.
        couplings: For each block what is coupled in it; None if the family is not described.
        family: The description by name; None if the family is not described.
    """

    blocks_path: str
    n_blocks: int
    linears: tuple[tuple[str, ...], ...]
    couplings: tuple[BlockCouplings, ...] | None
    family: Family | None

    def block_path(self, index: int) -> str:
        """Returns the dotted path of a block, which is the prefix of its tensors in the state dict."""
        return f"{self.blocks_path}.{index}"

    def block(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Returns a block of the model."""
        return model.get_submodule(self.block_path(index))

    def linear(self, model: PreTrainedModel, index: int, name: str) -> nn.Linear:
        """Returns a linear of a block by its name relative to the block.

        Raises:
            ModelError: The block has no such linear.
        """
        if name not in self.linears[index]:
            raise ModelError(
                f"{self.block_path(index)} has no linear {name!r}. It has: {', '.join(self.linears[index])}."
            )
        linear = self.block(model, index).get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    def linear_names(self, index: int) -> tuple[str, ...]:
        """Returns the names of the linears of a block relative to it, in module order."""
        return self.linears[index]


def discover(model: PreTrainedModel) -> Architecture:
    """Finds the blocks of a model, their linears and their couplings.

    Args:
        model: A causal language model; its parameters may be on the meta device.

    Returns:
        What was found.

    Raises:
        ModelError: There is no list of as many blocks as the configuration says, the blocks have no linears, or the
            shapes of the attention linears do not fit the head width.
    """
    config = model.config.get_text_config(decoder=True)
    blocks_path, blocks = _find_blocks(model, config)
    linears = tuple(_linears(block) for block in blocks)
    family = find_family(config.model_type)
    couplings = None
    # With index maps, the rows and columns of a linear are not those that the model around it sees.
    has_maps = any(isinstance(module, IndexedLinear) for module in blocks.modules())
    if family is not None and not has_maps and all(_described(family) <= set(names) for names in linears):
        couplings = tuple(
            BlockCouplings(family.mlp, _attention_coupling(family, block, f"{blocks_path}.{index}", config))
            for index, block in enumerate(blocks)
        )
    return Architecture(blocks_path, len(blocks), linears, couplings, family if couplings is not None else None)


def _find_blocks(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    """Finds the outermost `nn.ModuleList` of the right length; the largest one if there are several."""
    n_blocks = getattr(config, "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        is_candidate = isinstance(module, nn.ModuleList) and len(module) == n_blocks and len(module) > 0
        if is_candidate and not any(path.startswith(f"{outer}.") for outer, _ in found):
            assert isinstance(module, nn.ModuleList)
            found.append((path, module))
    with_linears = [(path, blocks) for path, blocks in found if any(_has_linears(block) for block in blocks)]
    if with_linears:
        return max(with_linears, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    name = type(model).__name__
    if found:
        paths = ", ".join(path for path, _ in found)
        kinds = sorted({type(part).__name__ for _, blocks in found for part in blocks.modules() if _has_weight(part)})
        raise ModelError(
            f"{name} has blocks at {paths} but no nn.Linear in them; what has weights there: {', '.join(kinds)}. Only "
            f"nn.Linear can be pruned. Described families: {family_names()}."
        )
    raise ModelError(
        f"No decoder blocks found in {name}: looked for an nn.ModuleList of config.num_hidden_layers = {n_blocks} "
        f"blocks. Any decoder built that way works; described families: {family_names()}."
    )


def _has_weight(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _linears(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))


def _has_linears(block: nn.Module) -> bool:
    """Whether a block has linears, or had some before it was pruned."""
    return any(isinstance(module, nn.Linear | Constant) for module in block.modules())


def _described(family: Family) -> set[str]:
    """Returns the names of all linears that the description of a family mentions."""
    attention, mlp = family.attention, family.mlp
    return {
        attention.query,
        attention.key,
        attention.value,
        attention.output,
        *mlp.row_linears,
        mlp.column_linear,
    }


def _attention_coupling(family: Family, block: nn.Module, path: str, config: PreTrainedConfig) -> AttentionCoupling:
    """Counts the heads of one block from the shapes of its linears, so that blocks may differ."""
    names = family.attention
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_query_rows, n_kv_rows = _out_features(block, names.query), _out_features(block, names.key)
    if names.layout is QkvLayout.FUSED_PER_HEAD:
        n_query_rows, n_kv_rows = n_query_rows // 3, n_kv_rows // 3
    n_query_heads, n_kv_heads = n_query_rows // head_dim, n_kv_rows // head_dim
    fits = n_query_heads * head_dim == n_query_rows and n_kv_heads * head_dim == n_kv_rows and n_kv_heads > 0
    if not fits or n_query_heads % n_kv_heads != 0:
        raise ModelError(
            f"{path}: {n_query_rows} query rows and {n_kv_rows} key rows are not whole heads of {head_dim} with a "
            "whole number of query heads to a key/value head. Check head_dim and the head counts in config.json."
        )
    return AttentionCoupling(
        names.query, names.key, names.value, names.output, n_query_heads, n_kv_heads, head_dim, names.layout
    )


def _out_features(block: nn.Module, name: str) -> int:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.out_features
