"""What every task needs to know: the store, the model and how to execute. Small, picklable, no tensors."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.models import BlockCouplings, Checkpoint, build_skeleton, count_parameters, discover
from surgeon.passes.groups import block_groups
from surgeon.store import Reference


@dataclass(frozen=True)
class LinearShape:
    """Name within its block and shape of one linear."""

    name: str
    n_out: int
    n_in: int
    has_bias: bool

    @property
    def n_weights(self) -> int:
        """Weights, the bias not counted."""
        return self.n_out * self.n_in


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and the layout of its blocks, known without opening its weights again.

    Attributes:
        checkpoint: local safetensors checkpoint.
        dtype: of weights and passes: "float32", "bfloat16" or "float16".
        blocks_path: dotted path of the list of blocks, for example "model.layers".
        blocks: for each block, its linears in module order.
        width: size of the hidden states.
        n_vocabulary: number of tokens.
        max_length: longest sequence the model's positions allow, or None.
        n_parameters: of the whole model, tied ones counted once.
        couplings: what belongs together in each block; None if the family is not described.
        heads_are_free: whether the stock configuration of the family can have any number of heads.
    """

    checkpoint: Checkpoint
    dtype: str
    blocks_path: str
    blocks: tuple[tuple[LinearShape, ...], ...]
    width: int
    n_vocabulary: int
    max_length: int | None
    n_parameters: int
    couplings: tuple[BlockCouplings, ...] | None = None
    heads_are_free: bool = False

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def n_weights(self) -> int:
        """Weights of all decoder linears: what sparsity is a fraction of."""
        return sum(linear.n_weights for block in self.blocks for linear in block)

    def shapes(self, linears: Collection[str] | None = None) -> list[list[tuple[int, int]]]:
        """For each block, `(n_out, n_in)` of its linears, or of those of these names."""
        return [[(s.n_out, s.n_in) for s in block if linears is None or s.name in linears] for block in self.blocks]

    @property
    def update_bytes(self) -> int:
        """Bytes of all weights of decoder linears as a shot stores them: float32."""
        return 4 * self.n_weights

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def split_rows(shapes: Sequence[LinearShape], values: NDArray[Any]) -> list[NDArray[Any]]:
    """Values of the rows of several linears, stored one after the other, by linear."""
    return np.split(values, np.cumsum([shape.n_out for shape in shapes])[:-1])


def split_columns(shapes: Sequence[LinearShape], values: NDArray[Any]) -> list[NDArray[Any]]:
    """Values of the columns of several linears, stored one after the other, by linear."""
    return np.split(values, np.cumsum([shape.n_in for shape in shapes])[:-1])


def describe_model(checkpoint: Checkpoint, dtype: str) -> ModelSpec:
    """The layout of a model, from its configuration; no weights are read.

    Args:
        checkpoint: local.
        dtype: of weights and passes, by its name in torch.

    Raises:
        ModelError: it cannot be built, or no blocks are found in it.
    """
    skeleton = build_skeleton(checkpoint, getattr(torch, dtype))
    architecture = discover(skeleton)
    blocks = []
    for index in range(architecture.n_blocks):
        linears = [(name, architecture.linear(skeleton, index, name)) for name in architecture.linear_names(index)]
        blocks.append(tuple(LinearShape(n, li.out_features, li.in_features, li.bias is not None) for n, li in linears))
    config = skeleton.config.get_text_config()
    return ModelSpec(
        checkpoint=checkpoint,
        dtype=dtype,
        blocks_path=architecture.blocks_path,
        blocks=tuple(blocks),
        width=config.hidden_size,
        n_vocabulary=config.vocab_size,
        max_length=getattr(config, "max_position_embeddings", None),
        n_parameters=count_parameters(skeleton),
        couplings=architecture.couplings,
        heads_are_free=architecture.family is not None and architecture.family.heads_are_free,
    )


@dataclass(frozen=True)
class Context:
    """Where results go and how work is executed.

    Attributes:
        store: directory of the store.
        model: the model.
        device: "cpu" or "cuda".
        batch_size: sequences at a time; it changes the last bits of results and so is part of their keys.
        blocks_per_group: blocks held in memory at a time; does not change results.
    """

    store: Path
    model: ModelSpec
    device: str
    batch_size: int
    blocks_per_group: int

    @property
    def dtype(self) -> str:
        """Of the model: what results are computed in."""
        return self.model.dtype

    @property
    def groups(self) -> list[range]:
        """All blocks in groups, first to last."""
        return block_groups(self.model.n_blocks, self.blocks_per_group)


@dataclass(frozen=True)
class StoredBlock:
    """Where the pruned weights of one block are: key and content digest of an update object."""

    key: str
    digest: str


@dataclass(frozen=True)
class ModelState:
    """A model on its way: the checkpoint, and for each block the update that replaces its linears (none: dense)."""

    checkpoint_digest: str
    updates: tuple[StoredBlock, ...] = ()

    def after(self, updates: list[Reference]) -> "ModelState":
        """The state in which every block has been updated."""
        return ModelState(self.checkpoint_digest, tuple(StoredBlock(ref.key, ref.digest) for ref in updates))

    @property
    def digest(self) -> str:
        """Digest of all weights of the model."""
        parts = [self.checkpoint_digest, *(block.digest for block in self.updates)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def block_digest(self, index: int) -> str:
        """Digest of what the weights of one block are made of."""
        return self.updates[index].digest if self.updates else self.checkpoint_digest
