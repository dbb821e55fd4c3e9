"""Reads tensors of a checkpoint by the names its model uses, a few at a time."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from surgeon.errors import ModelError
from surgeon.models.checkpoint import Checkpoint, StoredTensor, read_headers, read_model_type
from surgeon.models.families import find_family


class WeightFiles:
    """The tensors of a checkpoint, read on demand from its memory-mapped files.

    Names are those of the model's state dict. A checkpoint that was saved with one leading component more or less
    (`layers.0…` for `model.layers.0…`, or the reverse) is understood, and so are the renamed tensors of its family.

    Args:
        checkpoint: The checkpoint. Only headers are read here.

    Raises:
        ModelError: A file cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path: Path = checkpoint.path
        self._stored: dict[str, StoredTensor] = read_headers(checkpoint.path)
        family = find_family(read_model_type(checkpoint.path))
        self._renamed = family.renamed if family is not None else ()
        self._leading = {name.split(".", 1)[0] for name in self._stored}

    def names(self) -> tuple[str, ...]:
        """Returns the names of all stored tensors, as they are in the files."""
        return tuple(self._stored)

    def has(self, name: str) -> bool:
        """Says whether a tensor of the model is stored."""
        return self.stored_name(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor of the model.

        Raises:
            ModelError: It is not stored.
        """
        return self._stored[self._require(name)].shape

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Reads tensors into memory of their own.

        Args:
            names: Names of tensors of the model.
            dtype: Floating-point tensors are converted to it; others keep their type.

        Returns:
            Name as given → tensor on the CPU.

        Raises:
            ModelError: A name is not stored.
        """
        return {name: self._read(self._require(name), dtype) for name in names}

    def _read(self, stored_name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, from a mapping of its own: pages stay in the memory of the process as long as it is mapped."""
        with safe_open(self._stored[stored_name].file, framework="pt") as opened:
            mapped: Tensor = opened.get_tensor(stored_name)
            return mapped.to(dtype if mapped.is_floating_point() else mapped.dtype, copy=True)

    def matches(self, skeleton: PreTrainedModel) -> None:
        """Checks that the files hold every tensor of a model, in the model's shapes.

        Of tensors that are tied together one is enough.

        Args:
            skeleton: The model built from the checkpoint's configuration.

        Raises:
            ModelError: Tensors are missing or have other shapes.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        missing = [name for name in expected if not self.has(name)]
        for target, source in skeleton.get_expanded_tied_weights_keys(all_submodels=True).items():
            if self.has(target) or self.has(source):
                missing = [name for name in missing if name not in (target, source)]
        if missing:
            raise ModelError(
                f"{self._path} lacks {len(missing)} of {len(expected)} tensors of {type(skeleton).__name__}: "
                f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. The files hold for instance "
                f"{', '.join(self.names()[:2])}. Either files are missing, or this family stores tensors by other "
                "names than its model uses; then describe it in surgeon/models/families.py."
            )
        for name, shape in expected.items():
            if self.has(name) and self.shape(name) != shape:
                raise ModelError(
                    f"{self._path}: {name} is stored as {self.shape(name)}, but config.json makes it {shape}. "
                    "The weights and config.json are of different models."
                )

    def _require(self, name: str) -> str:
        stored_name = self.stored_name(name)
        if stored_name is None:
            raise ModelError(f"{self._path} does not hold the tensor {name!r}.")
        return stored_name

    def stored_name(self, name: str) -> str | None:
        """Returns the name in the files of a tensor of the model, or None if it is not stored."""
        if name in self._stored:
            return name
        for in_model, in_files in self._renamed:
            other = in_files + name.removeprefix(in_model)
            if name.startswith(in_model) and other in self._stored:
                return other
        first, _, rest = name.partition(".")
        if rest in self._stored and first not in self._leading:
            return rest
        longer = [f"{leading}.{name}" for leading in self._leading if f"{leading}.{name}" in self._stored]
        return longer[0] if len(longer) == 1 else None
