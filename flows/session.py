"""What all flows of one command share: parameters, files, the opened model layout and how to execute."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch

from flows.batching import CPU_BATCH, asked_batch, halve, known_limits
from flows.checks import check_pruning
from flows.engine import Engine
from flows.goal import Goal, find_goal
from flows.params import Params, RunParams
from flows.restoring import refill
from flows.workspace import Workspace
from surgeon.choices import Device, Precision, Structure
from surgeon.correction.adapters import AdapterSettings
from surgeon.curvature.spec import CurvatureSpec, Statistic
from surgeon.devices import free_bytes
from surgeon.errors import BatchMemoryError, CorruptObjectError, EvictedError, ParameterError
from surgeon.memory import MemoryEstimate, blocks_that_fit
from surgeon.models import Checkpoint, resolve_model
from surgeon.recipe import Recipe
from surgeon.store import Presence, Reference, Store, register
from tasks.calibration import SequenceSpec, WindowSpec, require_length, require_separate, sequences_task, windows_task
from tasks.context import Context, ModelSpec, ModelState, describe_model
from tasks.stage import WorkLeftError
from tasks.units import output_linears

T = TypeVar("T")
_COMMAND_LENGTH = 200
MEMORY_SHARE = 0.6
"""Part of the available memory a run takes when run.memory_gib is not given."""
GPU_MEMORY_SHARE = 0.8
"""The same of a GPU, which other programs leave alone."""
_MOST_DROPPED = 20
"""How often a stage goes on after another run has dropped what it was reading."""


@dataclass
class Session:
    """One command's run. Everything is opened when first needed and then kept.

    Attributes:
        params: all parameters.
        workspace: files.
        engine: runs and counts tasks.
        say: shows a line to the user (what takes time before any task runs).
        warn: shows a line that must be seen.
        keeps_first_shot: whether what the first shot measured stays whatever `run.keep` says, because other sessions
            start from the same model.
        block_times: what the target was turned into a fraction with, if that was measured.
        free_bytes: memory that can still be taken of a kind of device.
    """

    params: Params
    workspace: Workspace
    engine: Engine
    say: Callable[[str], None] = lambda _line: None
    warn: Callable[[str], None] = lambda _line: None
    keeps_first_shot: bool = False
    block_times: Reference | None = None
    free_bytes: Callable[[str], int] = free_bytes
    _calibrations: dict[SequenceSpec, Reference] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """How to prune, with every choice made."""
        return self.params.prune.recipe(self.params.seed)

    @cached_property
    def measured_linears(self) -> tuple[str, ...] | None:
        """Names of the linears whose statistics are needed; None for all.

        Units go by the columns of output linears, and only a Newton step changes anything else.
        """
        if self.recipe.granularity is not Structure.UNITS or self.recipe.update.newton_step:
            return None
        return output_linears(self.model)

    @cached_property
    def goal(self) -> Goal:
        """How much all shots together remove. A speed-up is measured for when first asked."""
        return find_goal(self)

    @property
    def n_shots(self) -> int:
        """Steps in which the goal is reached."""
        return self.params.prune.n_shots(self.goal.fraction)

    @cached_property
    def adapters(self) -> AdapterSettings:
        """How low-rank adapters are trained, where they are."""
        given = self.params.prune.adapters
        return AdapterSettings(
            rank=given.rank,
            learning_rate=given.learning_rate,
            epochs=given.epochs,
            fraction=given.fraction,
            batch_size=self.training_batch,
            seed=self.params.seed,
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model as a local safetensors checkpoint, fetched or converted on first use."""
        model = self.params.model
        return resolve_model(
            model.source,
            self.workspace.models,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            progress=self.say,
        )

    @cached_property
    def model(self) -> ModelSpec:
        """Layout of the model, from its configuration; no weights are read."""
        return describe_model(self.checkpoint, self.params.model.dtype)

    @property
    def device(self) -> str:
        """Kind of device that models run on, "cpu" or "cuda".

        Raises:
            ParameterError: a GPU was asked for and there is none.
        """
        wanted = self.params.run.device
        if wanted is Device.CUDA and not torch.cuda.is_available():
            raise ParameterError("run.device: cuda was asked for, but this torch sees no GPU; use cpu or auto")
        if wanted is Device.AUTO:
            return (Device.CUDA if torch.cuda.is_available() else Device.CPU).value
        return wanted.value

    @property
    def precision(self) -> Precision:
        """Of products of float32 matrices in passes.

        Raises:
            ParameterError: TensorFloat-32 was asked for, and models run on a CPU.
        """
        wanted = self.params.run.precision
        if wanted is Precision.TF32 and self.device == Device.CPU:
            raise ParameterError(
                "run.precision: tf32 has no effect on a CPU, only on a CUDA device, and there is none; use float32"
            )
        return wanted

    @cached_property
    def batch_size(self) -> int:
        """Sequences at a time: as asked for or chosen, and no more than memory was found to hold."""
        asked = asked_batch(self)
        return min(asked, known_limits(self).get("batch_size", asked))

    @property
    def training_batch(self) -> int:
        """Sequences at a time where the whole model is held with what training needs."""
        return min(self.params.run.batch_size or CPU_BATCH, self.batch_size)

    @property
    def memory_budget_gib(self) -> float:
        """Memory that passes of one worker may take, of the machine or, where they run on a GPU, of that."""
        run = self.params.run
        on_gpu = self.device == Device.CUDA
        share = GPU_MEMORY_SHARE if on_gpu else MEMORY_SHARE / (run.workers if run.cluster is None else 1)
        return run.memory_gib or share * self.free_bytes(self.device) / 2**30

    @cached_property
    def context(self) -> Context:
        """Store, model and execution settings for tasks."""
        run = self.params.run
        device, precision, batch_size = self.device, self.precision, self.batch_size
        _ = self.presence
        store = self.workspace.store.open()
        store.clear_stale_tmp()
        for line in store.limits():
            self.warn(line)
        refill(self.workspace, self.say)
        threads = threads_of(run) if device == Device.CPU.value else None
        if threads is not None:  # it is in the keys, so it must be true of this process, too
            torch.set_num_threads(threads)
        return Context(
            store=self.workspace.store,
            model=self.model,
            device=device,
            batch_size=batch_size,
            blocks_per_group=run.blocks_per_group or self._blocks_per_group(batch_size),
            threads=threads,
            precision=precision,
        )

    def adopt(self, context: Context) -> None:
        """Goes on with other settings of execution."""
        self.__dict__["context"] = context
        self.__dict__["batch_size"] = context.batch_size
        self.__dict__.pop("adapters", None)

    @cached_property
    def store(self) -> Store:
        """The store of the run."""
        return self.context.store.open()

    @cached_property
    def presence(self) -> Presence:
        """Keeps `surgeon clean` off the store for as long as the session lives."""
        return Presence(self.workspace.store.root, " ".join(["surgeon", *sys.argv[1:]])[:_COMMAND_LENGTH], self.say)

    def close(self) -> None:
        """Gives the store free, if it was used."""
        if "presence" in self.__dict__:
            self.presence.leave()

    def register(self) -> None:
        """Writes into the store that the workspace names results in it, so that `surgeon clean` asks it."""
        register(self.workspace.store.root, self.workspace.home)

    @property
    def dense(self) -> ModelState:
        """The state before anything is pruned."""
        return ModelState(self.checkpoint.digest)

    def sibling(self, params: Params) -> "Session":
        """A session that prunes in another way: the model, the texts and the execution must be the same.

        What has been opened is shared, so nothing is read or hashed twice, and what is measured of the dense model
        stays in the store for the next.
        """
        other = Session(
            params,
            self.workspace,
            self.engine,
            self.say,
            self.warn,
            free_bytes=self.free_bytes,
            keeps_first_shot=True,
            _calibrations=self._calibrations,
        )
        shared = ["checkpoint", "model", "context", "batch_size"]
        shared += ["windows"] if params.seed == self.params.seed else []
        other.__dict__.update({name: getattr(self, name) for name in shared})
        return other

    def rehearsal(self, engine: Engine, store: Store) -> "Session":
        """A session of the same run that looks at another store, and shares nothing that a task has made."""
        other = replace(self, engine=engine, _calibrations={})
        other.__dict__.update(
            checkpoint=self.checkpoint, model=self.model, context=self.context, batch_size=self.batch_size, store=store
        )
        return other

    def sequence_spec(self, shot: int = 1) -> SequenceSpec:
        """Calibration sequences of a shot: the same for all shots unless prune.fresh_calibration."""
        calibrate = self.params.calibrate
        return SequenceSpec(
            text=calibrate.text.spec(),
            n_sequences=calibrate.sequences,
            length=calibrate.length,
            order=calibrate.order,
            seed=self.params.seed,
            shot=shot if self.params.prune.fresh_calibration else 1,
        )

    def window_spec(self) -> WindowSpec:
        """Evaluation windows."""
        evaluate = self.params.evaluate
        return WindowSpec(evaluate.text.spec(), evaluate.windows, evaluate.length)

    def check(self, *, is_pruned: bool = True) -> None:
        """Finds bad input before any long work: model, texts, lengths, device, store.

        Args:
            is_pruned: whether the parameters of `prune` are about this model; another is only evaluated.

        Raises:
            InputError: naming what is wrong and what to do.
        """
        self.workspace.store.open()
        _ = self.model
        require_length(self.model, self.params.calibrate.length, "calibrate.length")
        require_length(self.model, self.params.evaluate.length, "evaluate.length")
        require_separate(self.sequence_spec().text, self.window_spec().text)
        if is_pruned:
            check_pruning(self)
        _ = self.context

    def stage(self, name: str, body: Callable[[], T], repair: Callable[[], object] = lambda: None) -> T:
        """Runs a stage; see `healed`."""
        return self.engine.stage(name, lambda: self.healed(body, repair))

    def healed(self, body: Callable[[], T], repair: Callable[[], object] = lambda: None) -> T:
        """Does something, again if what it reads is damaged or dropped meanwhile, or a batch does not fit.

        The store has moved a damaged result aside, so whatever needs it finds it missing and computes it; nothing else
        is computed again. A result is dropped by another run on the same store, which has finished what it is for.

        Args:
            body: asks for all it needs by key, whenever it is called.
            repair: makes what the body reads without asking for it.

        Raises:
            CorruptObjectError: a result was damaged again after it had been computed again.
        """
        damaged: set[str] = set()
        dropped = 0
        failed: BatchMemoryError | None = None
        while True:
            try:
                if damaged:
                    repair()
                return body()
            except CorruptObjectError as error:
                if error.key in damaged:
                    raise
                damaged.add(error.key)
                self.warn(f"{error} It is computed again.")
                self._forget_texts()
            except BatchMemoryError as error:
                failed = error
            except EvictedError:
                dropped += 1
                if dropped > _MOST_DROPPED:
                    raise
            except WorkLeftError:
                self._forget_texts()
                raise
            if failed is not None:
                halve(self, failed)
                failed = None

    def _forget_texts(self) -> None:
        """Asks for sequences and windows anew when they are needed next."""
        self._calibrations.clear()
        self.__dict__.pop("windows", None)

    def calibration(self, shot: int = 1) -> Reference:
        """Calibration sequences of a shot."""
        spec = self.sequence_spec(shot)
        if spec not in self._calibrations:
            name = "calibration/sequences"
            self._calibrations[spec] = self.engine.task(sequences_task, self.context, spec, name=name)
        return self._calibrations[spec]

    @cached_property
    def windows(self) -> Reference:
        """Evaluation windows, kept apart from the calibration sequences."""
        first = self.calibration()
        return self.engine.task(windows_task, self.context, self.window_spec(), first, name="evaluation/windows")

    def memory_estimate(self, blocks_per_group: int, batch_size: int | None = None) -> MemoryEstimate:
        """Expected peak memory of a curvature pass; sequences at a time are those of the session if not given."""
        batch_size = self.batch_size if batch_size is None else batch_size
        return MemoryEstimate.of(
            blocks=self.model.shapes(),
            measured=self.model.shapes(self.measured_linears if self.model.couplings else None),
            n_trunk=self.model.n_parameters - self.model.n_weights,
            width=self.model.width,
            n_vocabulary=self.model.n_vocabulary,
            batch_tokens=batch_size * max(self.params.calibrate.length, self.params.evaluate.length),
            pass_tokens=-(-self.params.calibrate.sequences // self.params.run.shards) * self.params.calibrate.length,
            dtype_bytes=self.model.torch_dtype.itemsize,
            blocks_per_group=blocks_per_group,
            factor_copies=_factor_copies(self.recipe.curvature),
        )

    def _blocks_per_group(self, batch_size: int) -> int:
        most = known_limits(self).get("blocks_per_group", self.model.n_blocks)
        on_gpu = self.device == Device.CUDA

        def estimate(blocks_per_group: int) -> MemoryEstimate:
            return self.memory_estimate(blocks_per_group, batch_size)

        return blocks_that_fit(estimate, most, self.memory_budget_gib, on_gpu=on_gpu)


def threads_of(run: RunParams) -> int | None:
    """Threads of torch in every worker on a CPU, where that is chosen; None is what torch takes by itself."""
    if run.threads is not None or run.workers == 1:
        return run.threads
    return max(1, (os.cpu_count() or 1) // run.workers)


def _factor_copies(spec: CurvatureSpec) -> int:
    """How many pairs of matrices of the size of a linear's two factors a pass holds at most."""
    if Statistic.KRONECKER_TERMS in spec.statistics:
        return 1 + 3 * spec.rank  # K-FAC's to start from; each term before and after, and its working copy
    return 3 if Statistic.MOMENTS in spec.statistics else 1  # factors, bases, and moments of about that size
