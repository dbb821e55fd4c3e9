"""A causal language model whose blocks are held and run one group at a time.

Blocks are called with the arguments captured from the model's own forward, and everything around them (embedding,
position arguments, masks, final norm, head, soft caps) is the model's own forward with stand-ins for its blocks:

- `BlockwiseModel.embed` runs it with stand-ins that note their arguments and hand the hidden states on;
- `BlockwiseModel.head` runs it with a last stand-in that returns given hidden states.

So no model code is copied, and new families and releases keep working.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.overrides = overrides
        self.weights = WeightFiles(checkpoint)
        self.model = build_skeleton(checkpoint, dtype)
        self.architecture: Architecture = discover(self.model)
        load_trunk(self.model, self.architecture, self.weights, dtype)
        self._to_device(self.model)
        self._returns_tuple = False
        self._loaded: set[int] = set()
        with self.loaded(range(1)):
            self._shared = self._probe()

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return self.architecture.n_blocks

    def block(self, index: int) -> nn.Module:
        """The module of one block."""
        return self.architecture.block(self.model, index)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one block by their name within it."""
        return {
            name: self.architecture.linear(self.model, index, name) for name in self.architecture.linear_names(index)
        }

    def shared(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Groups of linears of a block that read the same input, in module order.

        Found by running the first block. In a block with other linears each is alone in its group, which is right
        everywhere and only computes some factors more than once.
        """
        names = self.architecture.linear_names(index)
        return self._shared if names == self.architecture.linear_names(0) else tuple((name,) for name in names)

    @contextmanager
    def loaded(self, blocks: range) -> Iterator[None]:
        """Holds the weights of some blocks in memory, and drops those that were not there before at the end."""
        fresh = [index for index in blocks if index not in self._loaded]
        for index in fresh:
            block = self.block(index)
            load_into(block, self.prefix(index), self.weights, self.dtype, self.overrides(index))
            self._to_device(block)
            self._loaded.add(index)
        try:
            yield
        finally:
            for index in fresh:
                unload(self.block(index))
                self._loaded.discard(index)

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
        """Runs one loaded block on hidden states `[n_sequences, length, width]`."""
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
        """Runs the loaded first block once: what form it returns, and which linears share an input."""
        length = 2
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(_index: int, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            raise _StopForward

        with torch.no_grad():
            with self._stand_ins(catch), suppress(_StopForward):
                self.model(torch.zeros(1, length, dtype=torch.long, device=self.device), use_cache=False)
            args, kwargs = calls[0]

            def run() -> None:
                self._returns_tuple = isinstance(self.block(0)(*args, **kwargs), tuple)

            return shared_inputs(self.block(0), run, self.architecture.linear_names(0))

    def _as_returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def _split(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
        """Separates the hidden states (first parameter of the block's forward) from the other arguments."""
        if args:
            return args[0], BlockCall(tuple(args[1:]), kwargs)
        first = list(inspect.signature(type(self.block(index)).forward).parameters)[1]
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
            for block in blocks:
                del block.forward

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
