"""What every task needs to know: the store, the model and how to execute. Small, picklable, no tensors."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.choices import Precision
from surgeon.devices import place_of
from surgeon.models import BlockCouplings, Checkpoint, build_skeleton, count_parameters, discover
from surgeon.passes.groups import block_groups
from surgeon.store import Reference, StorePlace


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
        store: where it is.
        model: the model.
        device: "cpu" or "cuda".
        batch_size: sequences at a time; it changes the last bits of results and so is part of their keys.
        blocks_per_group: blocks held in memory at a time; does not change results.
        threads: of torch on a CPU, where that was chosen: libraries round in another way with another number, so it is
            part of keys. None is as many as the machine has.
        precision: of products of float32 matrices in passes on a GPU.
    """

    store: StorePlace
    model: ModelSpec
    device: str
    batch_size: int
    blocks_per_group: int
    threads: int | None = None
    precision: Precision = Precision.FLOAT32

    @property
    def arithmetic(self) -> str:
        """Kind of device as far as numbers depend on it."""
        return self.device if self.threads is None or self.device != "cpu" else f"{self.device}, {self.threads} threads"

    @property
    def dtype(self) -> str:
        """What passes compute in: the dtype of the model, or "tf32" for float32 with products of TensorFloat-32."""
        return self.precision.value if self.precision is Precision.TF32 else self.model.dtype

    @property
    def place(self) -> str:
        """The device itself: "cpu", or the GPU that this process has claimed, such as "cuda:1"."""
        return place_of(self.device)

    @property
    def groups(self) -> list[range]:
        """All blocks in groups, first to last."""
        return block_groups(self.model.n_blocks, self.blocks_per_group)


@dataclass(frozen=True)
class StoredBlock:
    """Where changed weights are: key and content digest of an object, of one block or of what is outside the blocks."""

    key: str
    digest: str


@dataclass(frozen=True)
class ModelState:
    """A model on its way from the dense checkpoint to a smaller one.

    Attributes:
        checkpoint_digest: of the dense checkpoint.
        updates: for each block the object that replaces its tensors; None where they are those of the checkpoint. Empty
            if that is so for all blocks.
        removed: indices of blocks that are gone whole, ascending.
        trunk: tensors outside the blocks that have changed (embeddings, final norm, head); None if none have.
    """

    checkpoint_digest: str
    updates: tuple[StoredBlock | None, ...] = ()
    removed: tuple[int, ...] = ()
    trunk: StoredBlock | None = None

    def after(self, updates: Sequence[Reference]) -> "ModelState":
        """The state in which every block has been updated."""
        return replace(self, updates=tuple(StoredBlock(ref.key, ref.digest) for ref in updates))

    def without(self, blocks: Collection[int]) -> "ModelState":
        """The state without some more blocks."""
        return replace(self, removed=tuple(sorted({*self.removed, *blocks})))

    def update_of(self, block: int) -> StoredBlock | None:
        """The object that replaces the tensors of a block; None where they are those of the checkpoint."""
        return self.updates[block] if self.updates else None

    @property
    def is_dense(self) -> bool:
        """Whether it is the model of the checkpoint."""
        return not self.removed and self.trunk is None and not any(self.updates)

    @property
    def digest(self) -> str:
        """Digest of all weights of the model."""
        parts = [self.checkpoint_digest, *(block.digest if block else "" for block in self.updates)]
        if self.removed:
            parts.append(f"without {self.removed}")
        if self.trunk is not None:
            parts.append(f"trunk {self.trunk.digest}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def block_digest(self, index: int) -> str:
        """Digest of what the weights of one block are made of."""
        update = self.update_of(index)
        return self.checkpoint_digest if update is None else update.digest

    @property
    def stored(self) -> list[StoredBlock]:
        """All stored objects that it is made of."""
        return [stored for stored in (*self.updates, self.trunk) if stored is not None]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON, but for the checkpoint."""

        def plain(stored: StoredBlock | None) -> list[str] | None:
            return None if stored is None else [stored.key, stored.digest]

        return {
            "updates": [plain(stored) for stored in self.updates],
            "removed": list(self.removed),
            "trunk": plain(self.trunk),
        }

    @classmethod
    def from_json(cls, checkpoint_digest: str, value: Mapping[str, Any]) -> "ModelState":
        """The state that `to_json` wrote down."""

        def stored(pair: Sequence[str] | None) -> StoredBlock | None:
            return None if pair is None else StoredBlock(*pair)

        return cls(
            checkpoint_digest, tuple(map(stored, value["updates"])), tuple(value["removed"]), stored(value["trunk"])
        )
