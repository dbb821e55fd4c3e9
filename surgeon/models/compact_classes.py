"""The classes that build a compact export, found from its `config.json` without running a file of its directory."""

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from surgeon.errors import ModelError
from surgeon.models import compact
from surgeon.models.checkpoint import CONFIG_NAME, read_model_type


def is_compact(path: Path) -> bool:
    """Whether a checkpoint directory is a compact export, by its `config.json`."""
    return read_model_type(path).startswith(compact.PREFIX)


def has_index_maps(path: Path) -> bool:
    """Whether linears of a compact export read or write only some of what the model around them has."""
    described = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")).get("pruned") or {}
    sizes = [sizes for layer in described.get("layers", ()) for sizes in layer["linears"].values()]
    return any((s[0], s[2]) != (s[1], s[3]) for s in sizes if 0 not in (s[0], s[2]))


def compact_classes(path: Path) -> tuple[type[Any], type[Any]]:
    """Classes of configuration and model of a compact export.

    Raises:
        ModelError: transformers has no causal language model of the kind it was made from.
    """
    base = read_model_type(path).removeprefix(compact.PREFIX)
    try:
        config_class = CONFIG_MAPPING[base]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        assert isinstance(model_class, type)
    except KeyError as error:
        raise ModelError(
            f"{path / CONFIG_NAME} has model_type {compact.PREFIX + base!r}, but transformers has no causal language "
            f"model {base!r}. A newer transformers may know it."
        ) from error
    return compact.config_class(config_class), compact.model_class(model_class)
