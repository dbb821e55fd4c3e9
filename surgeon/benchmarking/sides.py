"""One of the two models that are compared: where it is, and its size as far as the files tell."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from surgeon.errors import ModelError
from surgeon.models.checkpoint import CONFIG_NAME, find_weight_files

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of a head in files: where it is tied to the embeddings, some files hold it twice."""


@dataclass(frozen=True)
class Side:
    """A model to measure.

    Attributes:
        name: what it is called in results, "dense" or "pruned".
        directory: checkpoint of safetensors.
        trust_remote_code: whether its Python files may be run.
    """

    name: str
    directory: Path
    trust_remote_code: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in find_weight_files(self.directory))

    @property
    def stored_parameters(self) -> int:
        """Float numbers in the weight files, a head that is tied to the embeddings counted once."""
        sizes = {name: size for name, (size, dtype) in self._stored().items() if dtype in _DTYPES}
        if text_config(self.directory).get("tie_word_embeddings"):
            sizes = {name: size for name, size in sizes.items() if name not in _HEADS}
        return sum(sizes.values())

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype of the largest stored tensor, as torch has it.

        Raises:
            ModelError: it is not a float type.
        """
        _, found = max(self._stored().values())
        if found not in _DTYPES:
            raise ModelError(f"{self.directory} stores its weights as {found}; known are {', '.join(_DTYPES)}")
        return _DTYPES[found]

    def _stored(self) -> dict[str, tuple[int, str]]:
        """Name of each stored tensor → its numbers, and its dtype as the files call it."""
        found: dict[str, tuple[int, str]] = {}
        for file in find_weight_files(self.directory):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict: it cannot be iterated over)
                    part = opened.get_slice(name)
                    found[name] = (prod(part.get_shape()), str(part.get_dtype()))
        return found

    def dtype(self, wanted: str | None) -> str:
        """The dtype to load with: the wanted one, or as it is stored."""
        return wanted or self.stored_dtype


def text_config(directory: Path) -> dict[str, Any]:
    """The part of a checkpoint's configuration that describes the language model."""
    config: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    nested = config.get("text_config")
    return {"tie_word_embeddings": config.get("tie_word_embeddings"), **nested} if isinstance(nested, dict) else config
