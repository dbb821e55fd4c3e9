"""The work of each task of a run, from the shapes of the model and the parameters; `surgeon/planning` has the counts.

docs/planning.md says what is counted and what is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from flows.dry_run import Step
from flows.live import LiveShare
from flows.session import Session
from surgeon.curvature.spec import Statistic
from surgeon.planning.passes import (
    BlockShape,
    backward_work,
    forward_work,
    gram_work,
    head_backward_work,
    head_work,
    step_work,
)
from surgeon.planning.solves import cost_work, update_work
from surgeon.planning.work import NOTHING, Work
from surgeon.pruning.granularity import is_structured
from surgeon.text import read_text
from tasks.benchmark import benchmark_task
from tasks.block_times import block_times_task
from tasks.calibration import load_tokenizer, sequences_task, windows_task
from tasks.context import LinearShape, ModelState
from tasks.correction import correction_task
from tasks.costs import BlockWork, cost_task
from tasks.curvature import Measured
from tasks.evaluation import evaluation_task, sample_task
from tasks.export import export_task
from tasks.mask import mask_task
from tasks.measuring import GroupWork, boundary_task, curvature_task
from tasks.refining import kronecker_terms_task, moments_task
from tasks.sizes import ARRAY_BYTES, OBJECT_BYTES, array_bytes, n_arrays, shared_inputs
from tasks.update import Removal, update_task

_TEXT_S = 0.4
"""Reading a text and a tokenizer and cutting sequences."""
_MASK_S = 0.2
_BLOCK_TIMES_S = 20.0
_PROBE_TOKENS = 32
_SELECTION_READS = 3
"""How often costs of single weights are read to find a threshold."""


@dataclass(frozen=True)
class WorkModel:
    """Work by task.

    Args:
        session: parameters and model.
    """

    session: Session
    _live: dict[str, LiveShare] = field(default_factory=dict)

    def of(self, step: Step) -> Work:
        """Work of one task, and of storing what it gives."""
        bodies: dict[Callable[..., Any], Callable[..., Work]] = {
            sequences_task: lambda *_: Work.of(seconds=_TEXT_S),
            windows_task: lambda *_: Work.of(seconds=_TEXT_S),
            block_times_task: lambda *_: Work.of(seconds=_BLOCK_TIMES_S),
            boundary_task: self._boundary,
            curvature_task: self._curvature,
            moments_task: self._moments,
            kronecker_terms_task: self._terms,
            cost_task: self._costs,
            mask_task: self._mask,
            update_task: self._update,
            correction_task: self._correction,
            evaluation_task: self._evaluation,
            sample_task: self._sample,
            export_task: lambda _state: self.export,
            benchmark_task: lambda _state: self.benchmark,
        }
        return bodies[step.body](*step.arguments)

    @cached_property
    def blocks(self) -> tuple[BlockShape, ...]:
        """What a token costs in each block."""
        return block_shapes(self.session)

    @cached_property
    def _n_head(self) -> int:
        return self.session.model.width * self.session.model.n_vocabulary

    @property
    def _itemsize(self) -> int:
        return self.session.model.torch_dtype.itemsize

    @property
    def _calibration(self) -> tuple[int, int]:
        given = self.session.params.calibrate
        return given.sequences * given.length, given.length

    def _shapes(self, block: int, *, measured: bool = False) -> list[LinearShape]:
        names = self.session.measured_linears if measured else None
        return [s for s in self.session.model.blocks[block] if names is None or s.name in names]

    def _weights(self, blocks: Sequence[int]) -> int:
        return sum(s.n_weights for b in blocks for s in self.session.model.blocks[b])

    def _loaded(self, state: ModelState, blocks: Sequence[int]) -> Work:
        """Blocks brought into memory: from the checkpoint, or from the store."""
        n = self._weights(blocks)
        if not state.updates:
            return Work.of(loads=n * self._itemsize)
        return Work.of(reads=4 * n, copies=2 * n * self._itemsize)

    def _shot(self, label: str) -> LiveShare:
        return self._live.setdefault(label, LiveShare(self.session, int(label.removeprefix("shot-"))))

    def _bytes(self, kind: str, block: int) -> int:
        tokens, _ = self._calibration
        session = self.session
        return array_bytes(session.model, kind, block, session.recipe, session.measured_linears, tokens)

    def _stored(self, kind: str, block: int) -> Work:
        """Writing one result of a block: its bytes, its arrays, and as much as one more for the object itself."""
        session = self.session
        number = n_arrays(session.model, kind, block, session.recipe, session.measured_linears)
        return Work.of(writes=self._bytes(kind, block), arrays=number + 1)

    def object_bytes(self, kind: str, block: int) -> int:
        """Bytes on the disk of a result of a block."""
        session = self.session
        number = n_arrays(session.model, kind, block, session.recipe, session.measured_linears)
        return OBJECT_BYTES + number * ARRAY_BYTES + self._bytes(kind, block)

    def _passing(self, measured: Measured, group: range, *, backward: bool, draws: int) -> Work:
        """A pass through one group of blocks."""
        tokens, length = self._calibration
        blocks = [self.blocks[b] for b in group]
        last = group.stop == len(self.blocks)
        work = self._loaded(measured.state, group) + forward_work(blocks, tokens, length)
        if backward:
            work += draws * backward_work(blocks, tokens, length)
        if backward and last:
            work += head_work(self._n_head, tokens) + draws * head_backward_work(self._n_head, tokens)
        handed = (group.start > 0) + (backward and not last) * draws
        return work + Work.of(reads=4 * handed * tokens * self.session.model.width)

    def _boundary(self, measured: Measured, group: range) -> Work:
        tokens, _ = self._calibration
        work = Work.of(openings=1) + self._passing(measured, group, backward=False, draws=0)
        return work + Work.of(writes=4 * tokens * self.session.model.width, arrays=1)

    def _curvature(self, measured: Measured, work: GroupWork) -> Work:
        tokens, _ = self._calibration
        draws = work.targets.draws
        total = Work.of(openings=1)
        total += self._passing(measured, work.group, backward=work.needs_gradient, draws=draws)
        for block in work.blocks:
            shapes = self._shapes(block, measured=True)
            inputs = shared_inputs(self.session.model, block, self.session.measured_linears)
            for statistic in work.statistics:
                if statistic is Statistic.INPUT_FACTORS:
                    total += gram_work([s.n_in + s.has_bias for s in inputs], tokens)
                elif statistic is Statistic.OUTPUT_FACTORS:
                    total += gram_work([s.n_out for s in shapes], draws * tokens)
                else:
                    total += Work.of(products=sum(s.n_weights for s in shapes) * draws * tokens)
                total += self._stored(statistic.value, block)
        if work.hand_down:
            total += Work.of(writes=4 * draws * tokens * self.session.model.width, arrays=1)
        return total

    def _moments(self, measured: Measured, work: GroupWork) -> Work:
        tokens, _ = self._calibration
        total = Work.of(openings=1) + self._passing(measured, work.group, backward=True, draws=work.targets.draws)
        for block in work.blocks:
            shapes = self._shapes(block, measured=True)
            squares = sum(s.n_out**2 + s.n_in**2 for s in shapes)
            total += Work.of(
                eigen=sum(s.n_out**3 + s.n_in**3 for s in shapes),
                reads=2 * squares,
                products=work.targets.draws * tokens * (squares + sum(s.n_weights for s in shapes)),
            )
            total += self._stored(Statistic.MOMENTS.value, block)
        return total

    def _terms(self, measured: Measured, work: GroupWork) -> Work:
        tokens, _ = self._calibration
        spec = measured.spec
        passing = self._passing(measured, work.group, backward=True, draws=work.targets.draws)
        total = Work.of(openings=1) + spec.iterations * passing
        for block in work.blocks:
            shapes = self._shapes(block, measured=True)
            squares = sum(s.n_out**2 + s.n_in**2 for s in shapes)
            each = 3 * spec.rank * squares * work.targets.draws * tokens
            total += Work.of(products=spec.iterations * each, reads=2 * squares)
            total += self._stored(Statistic.KRONECKER_TERMS.value, block)
        return total

    def _costs(self, work: BlockWork) -> Work:
        live = self._shot(work.label)
        total = self._loaded(work.state, [work.block]) + self._factors_read(work.block)
        for shape in self._shapes(work.block, measured=True):
            total += cost_work(self.session.recipe, live.solved(work.block, shape))
        return total + self._stored("costs", work.block)

    def _factors_read(self, block: int) -> Work:
        kinds = self.session.recipe.curvature.statistics
        return Work.of(reads=sum(self._bytes(kind.value, block) for kind in kinds))

    def _mask(self, *_: Any) -> Work:
        total = Work.of(seconds=_MASK_S)
        if not is_structured(self.session.recipe.granularity):
            total += Work.of(reads=_SELECTION_READS * self.session.model.update_bytes)
        return total

    def _update(self, work: BlockWork, _removal: Removal) -> Work:
        live = self._shot(work.label)
        total = self._loaded(work.state, [work.block])
        changed = [s for s in self._shapes(work.block, measured=True) if live.is_changed(work.block, s)]
        if changed:
            total += self._factors_read(work.block)
        for shape in changed:
            total += update_work(self.session.recipe, live.solved(work.block, shape))
        return total + self._stored("update", work.block)

    def _correction(self, state: ModelState, *_: Any) -> Work:
        tokens, length = self._calibration
        given = self.session.params.prune.adapters
        seen = given.fraction * tokens
        every = range(len(self.blocks))
        once = forward_work(self.blocks, seen, length) + head_work(self._n_head, seen)
        back = backward_work(self.blocks, seen, length) + head_backward_work(self._n_head, seen)
        total = Work.of(openings=1) + 4 * self._loaded(state, every) + (2 + given.epochs) * once + given.epochs * back
        for block in every:
            total += self._stored("correction", block)
        return total

    def _evaluation(self, state: ModelState, *_: Any) -> Work:
        given = self.session.params.evaluate
        tokens = n_windows(self.session) * given.length
        every = range(len(self.blocks))
        loads = 1 if len(self.session.context.groups) == 1 else 2
        total = Work.of(openings=1, copies=4 * self.session.model.n_parameters) + loads * self._loaded(state, every)
        return total + forward_work(self.blocks, tokens, given.length) + head_work(self._n_head, tokens)

    def _sample(self, state: ModelState, *_: Any) -> Work:
        n_tokens = self.session.params.report.new_tokens
        total = Work.of(openings=1, seconds=_TEXT_S) + self._loaded(state, range(len(self.blocks)))
        return total + n_tokens * self._step(1.0, 1)

    def _step(self, kept: float, batch_size: int) -> Work:
        """One token each for some sequences, by a model that keeps a part of its decoder weights."""
        model = self.session.model
        n = model.n_parameters - (1.0 - kept) * model.n_weights
        return step_work(n * self._itemsize, kept * model.n_weights + self._n_head, batch_size)

    @property
    def _kept(self) -> float:
        """Part of the decoder weights that the exported model has."""
        return 1.0 - self.session.goal.fraction if is_structured(self.session.recipe.granularity) else 1.0

    @property
    def export_bytes(self) -> int:
        """Bytes of the exported weights."""
        return exported_bytes(self.session)

    @property
    def export(self) -> Work:
        """Reading all updates twice (to write, and for the logits to compare with), writing, loading back elsewhere."""
        model = self.session.model
        every = ModelState("", (None,))  # type: ignore[arg-type] # pruned, whatever the updates
        work = 2 * self._loaded(every, range(len(self.blocks))) + Work.of(files=self.export_bytes, openings=2)
        work += step_work(model.n_parameters * self._itemsize, model.n_weights + self._n_head, _PROBE_TOKENS)
        fresh = Work.of(processes=1, loads=self.export_bytes) + 2 * self._step(self._kept, _PROBE_TOKENS)
        return work + fresh

    @property
    def benchmark(self) -> Work:
        """Both models loaded side by side; each batch size a warm-up and the rounds: prompt, then token by token."""
        given = self.session.params.benchmark
        if not given.rounds:
            return NOTHING
        model = self.session.model
        both = Work.of(processes=1.3, loads=2 * model.n_parameters * self._itemsize)
        for kept in (1.0, self._kept):
            for size in given.batch_sizes:
                tokens = size * given.prompt
                prompt = kept * forward_work(self.blocks, tokens, given.prompt) + self._step(kept, 1)
                both += (given.rounds + 1) * (prompt + given.new_tokens * self._step(kept, size))
        return both


def block_shapes(session: Session) -> tuple[BlockShape, ...]:
    """What a token costs in each block of a session's model."""
    model = session.model
    shapes = []
    for index, block in enumerate(model.blocks):
        width = model.width
        if model.couplings is not None:
            attention = model.couplings[index].attention
            width = attention.n_query_heads * attention.head_dim
        shapes.append(BlockShape(sum(s.n_weights for s in block), width))
    return tuple(shapes)


def n_windows(session: Session) -> int:
    """Evaluation windows: as many as asked for, or as many as the text is likely to give."""
    given = session.params.evaluate
    if given.windows is not None:
        return given.windows
    text = read_text(given.text.spec()).text
    start = text[:100_000]
    n_tokens = len(load_tokenizer(session.checkpoint)(start)["input_ids"]) * len(text) / max(1, len(start))
    return max(1, int(n_tokens) // given.length)


def exported_bytes(session: Session) -> int:
    """Bytes of the exported weights, as far as the parameters tell: what is removed whole is not written."""
    model, given = session.model, session.params
    dtype: torch.dtype = getattr(torch, given.export.dtype or given.model.dtype)
    kept = 1.0
    if is_structured(session.recipe.granularity) and given.export.layout != "dense":
        kept = 1.0 - session.goal.fraction
    return int((model.n_parameters - (1.0 - kept) * model.n_weights) * dtype.itemsize)
