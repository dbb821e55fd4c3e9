"""The work of each task of a run, from the shapes of the model and the parameters; `surgeon/planning` has the counts.

docs/planning.md says what is counted and what is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flows.dry_run import Step
from flows.live import LiveShare
from flows.session import Session
from flows.work_after import benchmark_work, block_shapes, export_work, n_windows, token_work
from flows.work_bonsai import bonsai_works
from flows.work_layers import layer_works
from flows.work_recovery import recovery_bytes, recovery_works
from surgeon.curvature.spec import Statistic
from surgeon.planning.passes import (
    BlockShape,
    backward_work,
    forward_work,
    gram_work,
    head_backward_work,
    head_work,
)
from surgeon.planning.solves import cost_work, update_work
from surgeon.planning.work import NOTHING, Work
from surgeon.pruning.granularity import is_structured
from tasks.benchmark import benchmark_task
from tasks.block_times import block_times_task
from tasks.calibration import sequences_task, windows_task
from tasks.context import LinearShape, ModelState
from tasks.correction import correction_task
from tasks.costs import BlockWork, cost_task
from tasks.curvature import Measured
from tasks.evaluation import evaluation_task, sample_task
from tasks.export import export_task
from tasks.mask import mask_task
from tasks.measuring import GroupWork, boundary_task, curvature_task
from tasks.reducing import reduction_task
from tasks.refining import kronecker_terms_task, moments_task
from tasks.sizes import ARRAY_BYTES, OBJECT_BYTES, array_bytes, n_arrays, shared_inputs
from tasks.spectra import SPECTRA, SpectrumWork, spectrum_task
from tasks.update import Removal, update_task

_TOKENIZER_S = 0.3
"""Loading a tokenizer."""
_TEXT_S = 0.4
_TOKEN_S = 5e-6
"""Seconds for each token of the vocabulary, of which a digest is taken."""
_MASK_S = 0.05
_MASK_ARRAYS = 3
_OPENS = 3
"""How often the pruned linears of a block are opened where their live sets are read as well."""
_UNPACKED = 4
"""Bytes moved to unpack a byte of a triangle: both halves of the matrix."""
_ADDED = 8
"""Bytes moved for each byte of a statistic of a shard: converted to float64, weighted, added."""
_OBSERVED = 16
"""Bytes moved for each number that an observer sees: checked for being finite, and summed."""
_BLOCK_TIMES_S = 20.0
_VALUES_ALONE = 0.3
"""Part of a whole eigendecomposition that eigenvalues without vectors take."""
_SELECTION_READS = 3
"""How often costs of single weights are read to find a threshold."""
_SELECTION_COPIES = 60
"""Bytes moved for each byte of them: counted into bins, compared, sorted (measured)."""


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
            sequences_task: self._text,
            windows_task: self._text,
            block_times_task: lambda *_: Work.of(seconds=_BLOCK_TIMES_S),
            boundary_task: self._boundary,
            curvature_task: self._curvature,
            reduction_task: self._reduction,
            moments_task: self._moments,
            kronecker_terms_task: self._terms,
            cost_task: self._costs,
            mask_task: self._mask,
            update_task: self._update,
            correction_task: self._correction,
            evaluation_task: self._evaluation,
            sample_task: self._sample,
            spectrum_task: self._spectra,
            export_task: lambda _state: self._export(),
            benchmark_task: lambda _state: benchmark_work(self.session),
            **layer_works(self.session),
            **bonsai_works(self.session),
            **recovery_works(self.session),
        }
        return bodies[step.body](*step.arguments)

    def _text(self, *_: Any) -> Work:
        return Work.of(seconds=_TEXT_S + _TOKEN_S * self.session.model.n_vocabulary)

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

    def _tokens(self, measured: Measured) -> tuple[int, int]:
        """Calibration tokens that are measured, and the length of a sequence."""
        tokens, length = self._calibration
        return tokens if measured.part is None else (measured.part[1] - measured.part[0]) * length, length

    def _shapes(self, block: int, *, measured: bool = False) -> list[LinearShape]:
        names = self.session.measured_linears if measured else None
        return [s for s in self.session.model.blocks[block] if names is None or s.name in names]

    def _weights(self, blocks: Sequence[int]) -> int:
        return sum(s.n_weights for b in blocks for s in self.session.model.blocks[b])

    def _loaded(self, state: ModelState, blocks: Sequence[int], opens: int = 1) -> Work:
        """Blocks brought into memory: from the checkpoint, or from the store."""
        n = self._weights(blocks)
        return self._read(blocks, opens) if any(state.updates) else Work.of(loads=n * self._itemsize)

    def _read(self, blocks: Sequence[int], opens: int) -> Work:
        """Pruned linears of some blocks read from the store."""
        n = self._weights(blocks)
        return Work.of(reads=4 * n, copies=2 * n * self._itemsize) + opens * self._opened("update", blocks)

    def _opened(self, kind: str, blocks: Sequence[int]) -> Work:
        """Results of some blocks opened once; all arrays of one are checked."""
        model, recipe, names = self.session.model, self.session.recipe, self.session.measured_linears
        return Work.of(opened=sum(n_arrays(model, kind, block, recipe, names) for block in blocks))

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
        return OBJECT_BYTES + number * ARRAY_BYTES + self._bytes(kind, block) + recovery_bytes(session, kind)

    def _passing(self, measured: Measured, group: range, *, backward: bool, draws: int) -> Work:
        """A pass through one group of blocks."""
        tokens, length = self._tokens(measured)
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
        tokens, _ = self._tokens(measured)
        work = Work.of(openings=1) + self._passing(measured, group, backward=False, draws=0)
        return work + Work.of(writes=4 * tokens * self.session.model.width, arrays=1)

    def _curvature(self, measured: Measured, work: GroupWork) -> Work:
        tokens, _ = self._tokens(measured)
        draws = work.targets.draws
        total = Work.of(openings=1)
        total += self._passing(measured, work.group, backward=work.needs_gradient, draws=draws)
        for block in work.blocks:
            shapes = self._shapes(block, measured=True)
            inputs = shared_inputs(self.session.model, block, self.session.measured_linears)
            total += Work.of(copies=_OBSERVED * tokens * sum(s.n_out + s.n_in for s in shapes))
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

    def _reduction(self, measured: Measured, block: int, statistics: Sequence[Statistic]) -> Work:
        """Statistics of the shards read, added up in float64 and written."""
        total = NOTHING
        for statistic in statistics:
            n_bytes = measured.shards * self._bytes(statistic.value, block)
            total += Work.of(reads=n_bytes, copies=_ADDED * n_bytes) + self._stored(statistic.value, block)
            total += measured.shards * self._opened(statistic.value, [block])
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
        total = self._loaded(work.state, [work.block], _OPENS) + self._factors_read(work.block)
        for shape in self._shapes(work.block, measured=True):
            total += cost_work(self.session.recipe, live.solved(work.block, shape))
        return total + self._stored("costs", work.block)

    def _factors_read(self, block: int) -> Work:
        kinds = self.session.recipe.curvature.statistics
        work = NOTHING
        for kind in kinds:
            n_bytes = self._bytes(kind.value, block)
            work += Work.of(reads=n_bytes, copies=_UNPACKED * n_bytes) + self._opened(kind.value, [block])
        return work

    def _mask(self, *_: Any) -> Work:
        total = Work.of(seconds=_MASK_S) + self._opened("costs", range(len(self.blocks)))
        if not is_structured(self.session.recipe.granularity):
            n_bytes = self.session.model.update_bytes
            total += Work.of(reads=_SELECTION_READS * n_bytes, copies=_SELECTION_COPIES * n_bytes)
        return total

    def _update(self, work: BlockWork, removal: Removal) -> Work:
        n_masks = 0 if removal.mask is None else _MASK_ARRAYS
        live = self._shot(work.label)
        total = self._loaded(work.state, [work.block], _OPENS) + Work.of(opened=n_masks)
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
        total = Work.of(openings=1, seconds=_TOKENIZER_S) + self._loaded(state, range(len(self.blocks)))
        return total + n_tokens * token_work(self.session, 1.0, 1)

    def _spectra(self, work: SpectrumWork) -> Work:
        sides = [
            s.n_in + s.has_bias for s in shared_inputs(self.session.model, work.block, self.session.measured_linears)
        ]
        if Statistic.OUTPUT_FACTORS in work.factors:
            sides += [s.n_out for s in self._shapes(work.block, measured=True)]
        total = self._factors_read(work.block) + Work.of(eigen=_VALUES_ALONE * sum(side**3 for side in sides))
        return total + self._stored(SPECTRA.kind, work.block)

    def _export(self) -> Work:
        """Reading all updates twice (to write, and for the logits to compare with), writing, loading back elsewhere."""
        return 2 * self._read(range(len(self.blocks)), _OPENS) + export_work(self.session)
