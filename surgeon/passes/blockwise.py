"""A causal language model whose blocks are held and run one group at a time.

Blocks are called with the arguments captured from the model's own forward, and everything around them (embedding,
position arguments, masks, final norm, head, soft caps) is the model's own forward with stand-ins for its blocks:

- `BlockwiseModel.embed` runs it with stand-ins that note their arguments and hand the hidden states on;
- `BlockwiseModel.head` runs it with a last stand-in that returns given hidden states.

So no model code is copied, and new families and releases keep working.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.choices import Precision
from surgeon.errors import ModelError
from surgeon.models import (
    Architecture,
    Checkpoint,
    WeightFiles,
    build_skeleton,
    discover,
    load_into,
    load_trunk,
    shared_inputs,
    unload,
)
from surgeon.peak import give_back
from surgeon.precision import float32_products
from surgeon.repeatable import repeatable

Overrides = Callable[[int], Mapping[str, Tensor]]
"""Pruned weights by block: block index → {full name, "model.layers.7.mlp.up_proj.weight" say: tensor}."""


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the model's forward once the blocks' arguments are known."""


@dataclass(frozen=True)
class BlockCall:
    """Arguments the model's own forward gave to one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Embedded:
    """What comes before the blocks.

    Attributes:
        hidden: input of the first block, `[n_sequences, length, width]`.
        calls: for each block, its arguments.
    """

    hidden: Tensor
    calls: list[BlockCall] = field(default_factory=list)


def no_overrides(_block: int) -> Mapping[str, Tensor]:
    """The dense model: nothing replaced."""
    return {}


class BlockwiseModel:
    """A checkpoint opened so that only the trunk and one group of blocks need to be in memory.

    Args:
        checkpoint: local safetensors checkpoint.
        dtype: of weights and passes.
        device: where passes run.
        overrides: pruned weights that replace those of the checkpoint, by block.
        removed: blocks that are gone: hidden states pass by them, and their weights are never read.
        trunk: tensors outside the blocks that replace those of the checkpoint, by full name.
        precision: of products of float32 matrices on a GPU while blocks are loaded.

    Attributes:
        model: the transformers model; parameters of blocks that are not loaded are on the meta device.
        architecture: its blocks and linears.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        overrides: Overrides = no_overrides,
        removed: Collection[int] = (),
        trunk: Mapping[str, Tensor] = MappingProxyType({}),
        precision: Precision = Precision.FLOAT32,
    ) -> None:
        self.dtype = dtype
        self.precision = precision
        self.device = device
        self.overrides = overrides
        self.weights = WeightFiles(checkpoint)
        self.model = build_skeleton(checkpoint, dtype)
        self.architecture: Architecture = discover(self.model)
        self.removed = frozenset(removed)
        if len(self.removed) == self.n_blocks:
            raise ModelError(f"all {self.n_blocks} blocks are removed; at least one must stay")
        load_trunk(self.model, self.architecture, self.weights, dtype, trunk)
        self._to_device(self.model)
        self._returns_tuple = False
        self._loaded: set[int] = set()
        self._first = min(set(range(self.n_blocks)) - self.removed)
        with self.loaded(range(self._first, self._first + 1)):
            self._shared = self._probe()
        for index in self.removed:
            self._make_pass_by(index)

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.architecture.n_blocks

    def block(self, index: int) -> nn.Module:
        """The module of one block."""
        return self.architecture.block(self.model, index)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one block by their name within it; none of a removed one."""
        if index in self.removed:
            return {}
        return {
            name: self.architecture.linear(self.model, index, name) for name in self.architecture.linear_names(index)
        }

    def shared(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Groups of linears of a block that read the same input, in module order.

        Found by running the first block. In a block with other linears each is alone in its group, which is right
        everywhere and only computes some factors more than once.
        """
        names = self.architecture.linear_names(index)
        if index in self.removed:
            return ()
        alike = names == self.architecture.linear_names(self._first)
        return self._shared if alike else tuple((name,) for name in names)

    @contextmanager
    def loaded(self, blocks: range) -> Iterator[None]:
        """Holds the weights of some blocks in memory, and drops those that were not there before at the end.

        Inside, products of float32 matrices on a GPU are of the model's precision, and its algorithms repeatable.
        """
        fresh = [index for index in blocks if index not in self._loaded and index not in self.removed]
        for index in fresh:
            self.load(index)
        try:
            with float32_products(self.precision), repeatable(self.device):
                yield
        finally:
            for index in fresh:
                unload(self.block(index))
                self._loaded.discard(index)
            if fresh:
                give_back()

    def load(self, index: int) -> None:
        """Reads the weights of one block, which stay in memory."""
        block = self.block(index)
        load_into(block, self.prefix(index), self.weights, self.dtype, self.overrides(index))
        self._to_device(block)
        self._loaded.add(index)

    def prefix(self, index: int) -> str:
        """Dotted path of a block, for example "model.layers.7"."""
        return f"{self.architecture.blocks_path}.{index}"

    def embed(self, input_ids: Tensor) -> Embedded:
        """Runs what comes before the blocks.

        Args:
            input_ids: `[n_sequences, length]` int64.
        """
        found: list[Tensor] = []
        calls: list[BlockCall] = []

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = self._split(index, args, kwargs)
            found.append(hidden)
            calls.append(call)
            if index == self.n_blocks - 1:
                raise _StopForward
            return self._as_returned(hidden)

        with torch.no_grad(), self._stand_ins(note), suppress(_StopForward):
            self.model(input_ids.to(self.device), use_cache=False)
        return Embedded(found[0], calls)

    def run_block(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Runs one loaded block on hidden states `[n_sequences, length, width]`; they pass by a removed one."""
        if index in self.removed:
            return hidden
        output = self.block(index)(hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def head(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Runs what comes after the blocks.

        Args:
            input_ids: `[n_sequences, length]`, the tokens the hidden states belong to.
            hidden: output of the last block, `[n_sequences, length, width]`; may carry a graph.

        Returns:
            Logits `[n_sequences, length, n_vocabulary]`.
        """

        def replace(index: int, *args: Any, **kwargs: Any) -> Any:
            if index == self.n_blocks - 1:
                return self._as_returned(hidden)
            return self._as_returned(self._split(index, args, kwargs)[0])

        with self._stand_ins(replace):
            logits: Tensor = self.model(input_ids.to(self.device), use_cache=False).logits
        return logits

    def _probe(self) -> tuple[tuple[str, ...], ...]:
        """Runs the first block that is there once: what form it returns, and which linears share an input."""
        length = 2
        first = self.block(self._first)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(index: int, *args: Any, **kwargs: Any) -> Any:
            if index < self._first:
                return self._as_returned(self._split(index, args, kwargs)[0])
            calls.append((args, kwargs))
            raise _StopForward

        with torch.no_grad():
            with self._stand_ins(catch), suppress(_StopForward):
                self.model(torch.zeros(1, length, dtype=torch.long, device=self.device), use_cache=False)
            args, kwargs = calls[0]

            def run() -> None:
                self._returns_tuple = isinstance(first(*args, **kwargs), tuple)

            return shared_inputs(first, run, self.architecture.linear_names(self._first))

    def _make_pass_by(self, index: int) -> None:
        block = self.block(index)
        block.forward = partial(_pass_by, _hidden_name(block), self._returns_tuple)

    def _as_returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def _split(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
        """Separates the hidden states (first parameter of the block's forward) from the other arguments."""
        if args:
            return args[0], BlockCall(tuple(args[1:]), kwargs)
        first = _hidden_name(self.block(index))
        rest = {name: value for name, value in kwargs.items() if name != first}
        return kwargs[first], BlockCall((), rest)

    @contextmanager
    def _stand_ins(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Puts a function in the place of every block's forward: it gets the block's index, then the arguments."""
        blocks = [self.block(index) for index in range(self.n_blocks)]
        for index, block in enumerate(blocks):
            block.forward = partial(forward, index)
        try:
            yield
        finally:
            for index, block in enumerate(blocks):
                del block.forward
                if index in self.removed:
                    self._make_pass_by(index)

    def _to_device(self, module: nn.Module) -> None:
        if self.device == "cpu":
            return
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    child._parameters[name] = nn.Parameter(parameter.to(self.device), requires_grad=False)
            for name, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    child._buffers[name] = buffer.to(self.device)


def _hidden_name(block: nn.Module) -> str:
    """What a block's forward calls the hidden states, its first parameter."""
    return list(inspect.signature(type(block).forward).parameters)[1]


def _pass_by(name: str, returns_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of a removed block: gives the hidden states back."""
    hidden = args[0] if args else kwargs[name]
    return (hidden,) if returns_tuple else hidden
