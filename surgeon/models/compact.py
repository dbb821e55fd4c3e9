"""Causal language models of transformers whose linears have the sizes that pruning left them.

This file is copied as it is beside the weights of a compact export, so it imports torch and transformers only.
`PrunedLlamaForCausalLM` is `LlamaForCausalLM` that, once built, gets smaller modules where `config.pruned` says so; the
same goes for any other model of transformers. `config.pruned`:

    {"format": 1, "blocks": "model.layers", "attention": {"module": "self_attn", "output": "o_proj"},
     "layers": [{"heads": [6, 2], "linears": {"self_attn.q_proj": [48, 48, 100, 128], ...}}, ...]}

`heads` are query heads and key/value heads of the block; none at all means that its attention is gone. A linear has
[rows stored, outputs the model sees, columns stored, inputs the model sees]; what is seen but not stored is zero or not
read, and index buffers say which is which. A linear without rows or columns is a constant: its bias, or zero.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

PREFIX = "pruned_"
CLASS_PREFIX = "Pruned"
MODELLING_NAME = "modeling_pruned.py"
"""Name of this file beside the weights; `auto_map` in the configuration names it."""
FORMAT = 1


class IndexedLinear(nn.Linear):
    """A linear that reads some of its inputs, or writes some of its outputs; the others are zero.

    Args:
        rows: Outputs stored.
        width_out: Outputs the model sees.
        columns: Inputs read.
        width_in: Inputs the model gives.
        bias: Whether it has one, `[rows]`.
    """

    def __init__(self, rows: int, width_out: int, columns: int, width_in: int, bias: bool) -> None:
        super().__init__(columns, rows, bias)
        self.width_out, self.width_in = width_out, width_in
        self.kept_inputs: Tensor | None
        self.kept_outputs: Tensor | None
        self.register_buffer("kept_inputs", torch.zeros(columns, dtype=torch.int64) if columns < width_in else None)
        self.register_buffer("kept_outputs", torch.zeros(rows, dtype=torch.int64) if rows < width_out else None)

    def forward(self, input: Tensor) -> Tensor:
        """Maps `[..., width_in]` to `[..., width_out]`."""
        if self.kept_inputs is not None:
            input = input.index_select(-1, self.kept_inputs)
        output = super().forward(input)
        if self.kept_outputs is None:
            return output
        return output.new_zeros(*output.shape[:-1], self.width_out).index_copy(-1, self.kept_outputs, output)


class Constant(nn.Module):
    """What is left of a linear that no input reaches: its bias `[width]`, or zero."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.width = width
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Gives `[..., width]` whatever the input."""
        if self.bias is None:
            return hidden.new_zeros(*hidden.shape[:-1], self.width)
        return self.bias.expand(*hidden.shape[:-1], self.width)


class WithoutHeads(nn.Module):
    """What is left of an attention without heads: the constant of its output linear.

    (transformers takes a class named after attention in this file for an attention of an old kind.)
    """

    def __init__(self, layer_idx: int, output_name: str, output: Constant) -> None:
        super().__init__()
        self.layer_idx, self.output_name = layer_idx, output_name
        self.add_module(output_name, output)

    def forward(self, hidden_states: Tensor, *_args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Gives the constant, and keeps the cache counting: it takes its length from a block, often the first."""
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("layer_past") if cache is None else cache
        if cache is not None:
            n_sequences, length = hidden_states.shape[:2]
            nothing = hidden_states.new_zeros(n_sequences, 1, length, 1)
            cache.update(nothing, nothing, self.layer_idx)
        return self.get_submodule(self.output_name)(hidden_states), None


def shrink(model: nn.Module, pruned: Any) -> None:
    """Replaces the linears of a model's blocks by those that are described.

    Args:
        model: With the dense shapes of its configuration.
        pruned: See the module.

    Raises:
        ValueError: The description is of another format, or does not fit the model.
    """
    if not isinstance(pruned, dict) or pruned.get("format") != FORMAT:
        raise ValueError(f"config.pruned is not a description of format {FORMAT}; it needs another version of Surgeon")
    blocks, layers = model.get_submodule(pruned["blocks"]), pruned["layers"]
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(layers):
        raise ValueError(f"config.pruned describes {len(layers)} blocks at {pruned['blocks']}, the model has others")
    for block, layer in zip(blocks, layers, strict=True):
        for name, sizes in layer["linears"].items():
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, _replacement(block.get_submodule(name), sizes))
        if pruned["attention"] is not None:
            set_heads(block, pruned["attention"]["module"], pruned["attention"]["output"], *layer["heads"])


def _replacement(linear: nn.Module, sizes: list[int]) -> nn.Module:
    rows, width_out, columns, width_in = sizes
    if not isinstance(linear, nn.Linear) or not (0 <= rows <= width_out and 0 <= columns <= width_in):
        raise ValueError(f"config.pruned has sizes {sizes}, which are none of a {type(linear).__name__}")
    has_bias = linear.bias is not None
    if rows == 0 or columns == 0:
        new: nn.Module = Constant(width_out, has_bias and rows > 0)
    elif (rows, columns) == (width_out, width_in):
        new = nn.Linear(columns, rows, has_bias)
    else:
        new = IndexedLinear(rows, width_out, columns, width_in, has_bias)
    return new.to(linear.weight.dtype)


def set_heads(block: nn.Module, name: str, output: str, n_query_heads: int, n_kv_heads: int) -> None:
    """Tells the attention of a block how many heads its linears have; without heads, a constant takes its place."""
    attention = block.get_submodule(name)
    if n_kv_heads == 0:
        setattr(block, name, WithoutHeads(attention.layer_idx, output, attention.get_submodule(output)))  # type: ignore[arg-type]
        return
    for attribute, value in (("num_heads", n_query_heads), ("num_key_value_groups", n_query_heads // n_kv_heads)):
        if hasattr(attention, attribute):
            setattr(attention, attribute, value)


def config_class(base: type[Any]) -> type[Any]:
    """The configuration of pruned models of a kind, by the configuration class of the dense ones."""
    return _class(base, {"model_type": PREFIX + base.model_type})


def model_class(base: type[Any]) -> type[Any]:
    """The class of pruned models of a kind, by the class of the dense ones."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, config, *args, **kwargs)
        shrink(self, getattr(config, "pruned", None))

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves this file too: transformers does so only for a model that it has loaded with `trust_remote_code`."""
        base.save_pretrained(self, save_directory, *args, **kwargs)
        if Path(save_directory).is_dir():
            (Path(save_directory) / MODELLING_NAME).write_bytes(Path(__file__).read_bytes())

    methods = {"__init__": __init__, "save_pretrained": save_pretrained}
    return _class(base, {"config_class": config_class(base.config_class), **methods})


def _class(base: type[Any], attributes: dict[str, Any]) -> type[Any]:
    """Makes a class once; it is found in this module under its name, as transformers looks for it."""
    name = CLASS_PREFIX + base.__name__
    if name not in globals():
        globals()[name] = type(name, (base,), {**attributes, "__module__": __name__, "__qualname__": name})
    made: type[Any] = globals()[name]
    return made


def __getattr__(name: str) -> type[Any]:
    base = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"{__name__} has no {name}")
    return model_class(base) if issubclass(base, transformers.PreTrainedModel) else config_class(base)
