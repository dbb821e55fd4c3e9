"""A model without weights, into which weights are loaded one block at a time.

The skeleton is the model built from its configuration with all parameters on the meta device and all buffers real. The
trunk (embeddings, final norm, head) is loaded once; a block is loaded when it is run and unloaded after, so the memory
of one block is needed at a time.
"""

import threading
from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgeon.errors import ModelError
from surgeon.models.architecture import Architecture
from surgeon.models.checkpoint import CONFIG_NAME, Checkpoint
from surgeon.models.compact_classes import compact_classes, is_compact
from surgeon.models.quiet import quiet_transformers
from surgeon.models.weights import WeightFiles

__all__ = ["WeightFiles", "build_skeleton", "load_into", "load_trunk", "unload"]

# Building with empty weights replaces nn.Module.register_parameter for a moment: another thread that gave a module its
# parameters meanwhile would have them put on the meta device.
REGISTERING = threading.Lock()


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, *, attention: str | None = None) -> PreTrainedModel:
    """Builds a model from its configuration without reading weights.

    Args:
        checkpoint: The checkpoint whose configuration is used.
        dtype: Type of the parameters.
        attention: Attention implementation of transformers: `sdpa`, `eager`, or None for the model's own choice
            (sdpa where it has one).

    Returns:
        The model in evaluation mode with parameters on the meta device that need no gradient, real buffers, and no
        key/value cache.

    Raises:
        ModelError: transformers does not know the architecture, or it is not a causal language model.
    """
    if attention not in (None, "sdpa", "eager"):
        raise ModelError(f"attention={attention!r} is not supported. Use 'sdpa' or 'eager'.")
    trust = checkpoint.trust_remote_code
    with REGISTERING, quiet_transformers():
        try:
            if is_compact(checkpoint.path):
                model = _compact_skeleton(checkpoint, dtype, attention)
            else:
                config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
                config.get_text_config(decoder=True).use_cache = False
                with init_empty_weights(include_buffers=False):
                    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                        config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
                    )
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ModelError(
                f"transformers cannot build a causal language model from {checkpoint.path / CONFIG_NAME} "
                f"({type(error).__name__}: {error}). A newer transformers may know it; if the model brings its own "
                "code and you trust it, turn trust_remote_code on."
            ) from error
    model.train(mode=False)
    model.requires_grad_(False)
    return model


def count_parameters(skeleton: PreTrainedModel) -> int:
    """Number of parameters of a skeleton; those that will be tied to others count once."""
    tied = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    named = skeleton.named_parameters(remove_duplicate=False)
    return sum(parameter.numel() for name, parameter in named if name not in tied)


def _compact_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """A compact export by the classes of this package: the Python file in its directory is not run."""
    config_class, model_class = compact_classes(checkpoint.path)
    config = config_class.from_pretrained(checkpoint.path)
    config.get_text_config(decoder=True).use_cache = False
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def load_into(
    module: nn.Module,
    prefix: str,
    weights: WeightFiles,
    dtype: torch.dtype,
    overrides: Mapping[str, Tensor] | None = None,
) -> None:
    """Gives one module its weights, on the CPU.

    Buffers that are not part of the state dict are left alone.

    Args:
        module: A module of a skeleton, for instance a block.
        prefix: Its dotted path in the model, which is the prefix of its tensors.
        weights: Where the tensors are read from.
        dtype: Type of the parameters.
        overrides: Tensors by full name in the model that take the place of stored ones, for instance pruned weights.
            They are copied. Those outside the module are ignored, so one mapping can serve all blocks.

    Raises:
        ModelError: A tensor is not stored, or an override names no tensor of the module or has another shape.
    """
    expected = {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    replaced = {name: value for name, value in (overrides or {}).items() if name.startswith(f"{prefix}.")}
    _check_overrides(replaced, expected, prefix)
    tensors = weights.read((name for name in expected if name not in replaced), dtype)
    for name, value in replaced.items():
        wanted = dtype if value.is_floating_point() else value.dtype
        tensors[name] = value.detach().to(device="cpu", dtype=wanted, copy=True)
    stripped = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    with REGISTERING:
        module.load_state_dict(stripped, strict=True, assign=True)


def unload(module: nn.Module) -> None:
    """Puts the parameters of a module back on the meta device, which frees their memory. Buffers stay."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def load_trunk(
    model: PreTrainedModel,
    architecture: Architecture,
    weights: WeightFiles,
    dtype: torch.dtype,
    overrides: Mapping[str, Tensor] | None = None,
) -> None:
    """Loads everything outside the blocks (embeddings, final norm, head) and ties what is tied.

    Args:
        model: A skeleton.
        architecture: Its structure.
        weights: Where the tensors are read from.
        dtype: Type of the parameters.
        overrides: Tensors by full name that take the place of stored ones. They are copied.

    Raises:
        ModelError: Tensors are missing or have other shapes than the model (in its blocks too), or an override names no
            tensor outside the blocks.
    """
    weights.matches(model)
    inside = f"{architecture.blocks_path}."
    trunk = {name for name in model.state_dict() if not name.startswith(inside)}
    replaced = overrides or {}
    # Of tensors that are tied together the one that is replaced counts, whichever is stored.
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).items() if replaced else ()
    superseded = {a for pair in tied for a, b in (pair, pair[::-1]) if b in replaced and a not in replaced}
    stored = [name for name in trunk if weights.has(name) and name not in superseded]
    _check_overrides(replaced, {name: model.state_dict()[name] for name in trunk}, "the trunk")
    tensors = weights.read((name for name in stored if name not in replaced), dtype)
    tensors |= {name: value.detach().to(dtype=dtype, copy=True) for name, value in replaced.items()}
    with REGISTERING:
        model.load_state_dict(tensors, strict=False, assign=True)
        # Given what is missing, transformers ties as it does when loading a model, in whichever direction works.
        model.tie_weights(missing_keys=trunk - set(stored) - set(replaced))


def _check_overrides(replaced: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str) -> None:
    for name, value in replaced.items():
        if name not in expected:
            raise ModelError(f"The override {name!r} names no tensor of {prefix}. It has: {', '.join(expected)}.")
        if value.shape != expected[name].shape:
            raise ModelError(
                f"The override {name!r} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)} as the model."
            )
