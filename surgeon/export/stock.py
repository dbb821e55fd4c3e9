"""Configurations of stock transformers for a uniformly narrower model, if there is one.

Candidates are built on the meta device; the first whose tensors have exactly the shapes that will be written, and whose
attention reads them as heads of the right width, is taken.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgeon.export.layout import BlockLayout
from surgeon.models import Architecture
from surgeon.models.compact import CLASS_PREFIX, PREFIX
from surgeon.models.depth import shorter_config
from surgeon.models.quiet import quiet_transformers
from surgeon.models.skeleton import REGISTERING

Shapes = Mapping[str, tuple[int, ...]]
_MLP_WIDTHS = ("intermediate_size", "ffn_dim")


@dataclass(frozen=True)
class DenseModel:
    """The model that is pruned, without weights.

    Attributes:
        config: content of its `config.json`, without blocks that are gone whole.
        skeleton: the model on the meta device.
        architecture: its blocks and linears.
        brings_code: whether its own Python files are run to build it.
    """

    config: Mapping[str, Any]
    skeleton: PreTrainedModel
    architecture: Architecture
    brings_code: bool


def stock_config(model: DenseModel, block: BlockLayout, kept: Sequence[int], shapes: Shapes) -> dict[str, Any] | None:
    """Finds a configuration with which stock transformers builds the narrower model.

    Args:
        model: the dense one.
        block: layout of any block, as all are alike.
        kept: indices of the blocks that are left.
        shapes: name of every tensor in the smaller model → the shape it will have.

    Returns:
        Content of `config.json`, or None if no stock model has these shapes.
    """
    for candidate in _candidates(model, block, kept):
        built = _build(candidate)
        if built is not None and _fits(built, model, block, kept, shapes):
            return candidate
    return None


def has_shapes(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether stock transformers builds a model with exactly these tensors from a configuration."""
    built = _build(config) if config.get("model_type") in CONFIG_MAPPING else None
    return built is not None and _shapes(built) == dict(shapes)


def _candidates(model: DenseModel, block: BlockLayout, kept: Sequence[int]) -> Iterator[dict[str, Any]]:
    base = base_config(model.config)
    dense = model.skeleton.config.get_text_config(decoder=True)
    couplings = model.architecture.couplings
    assert couplings is not None
    heads: dict[str, Any] = {}
    # A compact model has the heads of the dense one in its configuration, so every block's own count is compared.
    if block.n_query_heads != dense.num_attention_heads:
        heads["num_attention_heads"] = block.n_query_heads
        heads["head_dim"] = couplings[0].attention.head_dim
        if hasattr(dense, "num_key_value_heads"):
            heads["num_key_value_heads"] = block.n_kv_heads
    width = next(name for name in _MLP_WIDTHS if hasattr(dense, name))
    edited = {**base, width: block.n_neurons, **heads}
    yield edited
    if base.get("model_type") == "llama" and heads:
        # LlamaConfig insists on heads that divide the width; a Mistral without a window is the same model. Everything
        # is written out, as the defaults of the two differ.
        yield {
            **shorter_config(_written_out(dense), dense.to_dict(), model.architecture.n_blocks, kept),
            **edited,
            "rope_parameters": copy.deepcopy(dense.rope_parameters),
            "rms_norm_eps": dense.rms_norm_eps,
            "hidden_act": dense.hidden_act,
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
        }


def _written_out(config: Any) -> dict[str, Any]:
    """A configuration with every default in it, without what a Llama alone has."""
    not_shared = ("attention_bias", "mlp_bias", "pretraining_tp", "transformers_version", "pruned", "auto_map", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in not_shared}


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint without what makes it a compact one."""
    if not str(config.get("model_type", "")).startswith(PREFIX):
        return dict(config)
    base = {name: value for name, value in config.items() if name not in ("pruned", "auto_map")}
    base["model_type"] = str(config["model_type"]).removeprefix(PREFIX)
    base["architectures"] = [str(name).removeprefix(CLASS_PREFIX) for name in config.get("architectures") or []]
    return base


def _build(config: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model of a configuration on the meta device; None if transformers refuses the configuration."""
    with REGISTERING, quiet_transformers():
        try:
            made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            with init_empty_weights(include_buffers=False):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(made, dtype=torch.float32)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError):
            return None
        except Exception as error:
            # Configurations are checked by huggingface_hub, whose error is no ValueError in all versions.
            if "Validation" in type(error).__name__:
                return None
            raise
    return model


def _shapes(built: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _fits(built: PreTrainedModel, model: DenseModel, block: BlockLayout, kept: Sequence[int], shapes: Shapes) -> bool:
    if _shapes(built) != dict(shapes):
        return False
    couplings, family = model.architecture.couplings, model.architecture.family
    assert couplings is not None and family is not None
    head_dim, n_groups = couplings[0].attention.head_dim, block.n_kv_heads
    assert n_groups
    parent = family.attention.output.rpartition(".")[0]
    for position, index in enumerate(kept):
        attention: Any = built.get_submodule(f"{model.architecture.block_path(position)}.{parent}")
        found = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        ratio = getattr(
            attention, "num_key_value_groups", block.n_query_heads // n_groups if block.n_query_heads else 0
        )
        if found != head_dim or ratio * n_groups != block.n_query_heads:
            return False
        if getattr(attention, "scaling", None) != getattr(_attention(model, index, parent), "scaling", None):
            return False
    return True


def _attention(model: DenseModel, index: int, parent: str) -> Any:
    return model.architecture.block(model.skeleton, index).get_submodule(parent)
