"""Recovery training in segments: each is a result, so a run that was killed goes on after the last."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.choices import LossTerm, Recovery
from surgeon.correction.masked import MaskedAdapter
from surgeon.errors import ParameterError
from surgeon.recovery.distillation import Distillation, find_taps
from surgeon.recovery.lora import adapted_linears, adapter_parameters, recovery_adapters
from surgeon.recovery.objective import NextTokens, Objective
from surgeon.recovery.settings import RecoverySettings
from surgeon.recovery.state import TrainingState
from surgeon.recovery.training import StepLoss, Trainer, trainable_parameters, training_memory, validation_loss
from surgeon.shrinking import ShrunkModel
from surgeon.store import Reference
from surgeon.text.tokenizers import TokenArray
from tasks.context import Context, ModelState
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays
from tasks.weights import open_shrunk

TRAINING_SOURCES = (
    "surgeon.correction.masked",
    "surgeon.passes.loss",
    "surgeon.recovery.distillation",
    "surgeon.recovery.lora",
    "surgeon.recovery.objective",
    "surgeon.recovery.packing",
    "surgeon.recovery.schedule",
    "surgeon.recovery.state",
    "surgeon.recovery.training",
    "surgeon.shrinking",
)
TRAINING = Stage("training", 1, TRAINING_SOURCES)


@dataclass(frozen=True)
class RecoveryWork:
    """What is trained, on what and how.

    Attributes:
        state: the pruned model.
        corpus: rows, as `tasks.corpus.corpus_task` gave them.
        settings: of the training.
    """

    state: ModelState
    corpus: Reference
    settings: RecoverySettings

    @property
    def parameters(self) -> dict[str, Any]:
        """What the numbers depend on; where segments end is with the segment."""
        return {name: value for name, value in self.settings.to_json().items() if name != "segment_steps"}

    @property
    def inputs(self) -> dict[str, str]:
        """Content digests of what is read."""
        return {"weights": self.state.digest, "corpus": self.corpus.digest}


def segment_name(index: int) -> str:
    """Readable name of a segment, from 0."""
    return f"recovery/segment-{index + 1:03d}/training"


def training_request(_context: Context, work: RecoveryWork, index: int, previous: Reference | None) -> Request:
    """The request for the state after a segment."""
    steps = work.settings.segments[index]
    parameters = {**work.parameters, "start": steps.start, "stop": steps.stop}
    inputs = dict(work.inputs) if previous is None else {**work.inputs, "previous": previous.digest}
    return Request(TRAINING, parameters, inputs, segment_name(index))


def training_task(context: Context, work: RecoveryWork, index: int, previous: Reference | None) -> Outcome[Reference]:
    """Parameters, moments and step after a segment; losses are in the attributes.

    Args:
        context: store and model.
        work: what is trained.
        index: of the segment, from 0.
        previous: the segment before, with its arrays; None for the first.

    Raises:
        NonFiniteError: a loss or a gradient is not finite; names the step.
        MemoryShortageError: there is not enough memory; segments before this one are kept.
    """
    settings = work.settings
    steps = settings.segments[index]

    def compute() -> Product:
        corpus = read_arrays(context, work.corpus.key)
        progress = _SegmentProgress(settings, steps)
        with opened_training(context, work, corpus["training"]) as opened:
            attributes = opened.sizes()
            if previous is None:
                before = validation_loss(opened.model.model, corpus["validation"], settings.micro_batch)
                attributes["validation_before"] = before
            else:
                opened.trainer.restore(TrainingState.from_arrays(read_arrays(context, previous.key)))
            losses = opened.trainer.run(len(steps), progress)
            after = validation_loss(opened.model.model, corpus["validation"], settings.micro_batch)
            state = opened.trainer.state(moments=steps.stop < settings.steps)
        return Product(
            state.to_arrays(), {**attributes, **_curve(losses), "stop": steps.stop, "validation_loss": after}
        )

    return produce(context, training_request(context, work, index, previous), compute)


@dataclass
class OpenedTraining:
    """A pruned model in memory, ready to be trained.

    Attributes:
        model: the model.
        trainer: of it.
        adapters: by the full name of their linear; none unless they are what is trained.
        live: live weights of those linears.
        n_teacher: parameters of the dense model, where it is in memory too.
    """

    model: ShrunkModel
    trainer: Trainer
    adapters: Mapping[str, MaskedAdapter]
    live: Mapping[str, Tensor]
    n_teacher: int

    def sizes(self) -> dict[str, Any]:
        """How many numbers the model and its teacher have, and how many are trained."""
        total = {id(p): p.numel() for p in self.model.model.parameters()}
        adapters = {id(p) for adapter in self.adapters.values() for p in (adapter.a, adapter.b)}
        return {
            "n_parameters": sum(n for key, n in total.items() if key not in adapters),
            "n_trained": sum(p.numel() for p in self.trainer.parameters.values()),
            "n_teacher": self.n_teacher,
        }


@contextmanager
def opened_training(context: Context, work: RecoveryWork, rows: TokenArray) -> Iterator[OpenedTraining]:
    """Opens a pruned model to be trained, in float32 whatever the model is, with its teacher where it is needed."""
    settings = work.settings
    wide = replace(context, model=replace(context.model, dtype="float32"))
    with training_memory():
        shrunk = open_shrunk(wide, work.state)
        teacher = open_shrunk(wide, ModelState(work.state.checkpoint_digest)) if settings.needs_teacher else None
    objective: Objective = NextTokens(shrunk.model)
    if teacher is not None:
        objective = _beside(context, shrunk, teacher, settings)
    n_teacher = 0 if teacher is None else sum(p.numel() for p in teacher.model.parameters())
    if settings.method is not Recovery.LORA:
        parameters = trainable_parameters(shrunk.model)
        yield OpenedTraining(shrunk, Trainer(objective, parameters, shrunk.masks, settings, rows), {}, {}, n_teacher)
        return
    live = adapted_linears(_live_linears(context, shrunk), settings.linears)
    with recovery_adapters(shrunk.model, live, settings) as adapters:
        trainer = Trainer(objective, adapter_parameters(adapters), {}, settings, rows)
        yield OpenedTraining(shrunk, trainer, adapters, live, n_teacher)


def _live_linears(context: Context, shrunk: ShrunkModel) -> dict[str, Tensor]:
    """Live weights of every linear of the blocks by its full name in the model; empty for one that is gone."""
    live = {}
    for block in shrunk.blocks:
        for shape in context.model.blocks[block]:
            linear, name = shrunk.linear(block, shape.name), f"{shrunk.path(block)}.{shape.name}"
            weight = linear.weight if isinstance(linear, nn.Linear) else torch.empty(0, 0)
            live[name] = shrunk.masks.get(f"{name}.weight", torch.ones_like(weight, dtype=torch.bool))
    return live


def _beside(context: Context, student: ShrunkModel, teacher: ShrunkModel, settings: RecoverySettings) -> Objective:
    """The loss that compares a model with the dense one, each block with the block it came from."""
    couplings = context.model.couplings
    if couplings is None and LossTerm.ATTENTION in settings.terms:
        raise ParameterError(
            "recovery terms: attention needs to know the last linear of an attention, which only described families "
            "have (surgeon/models/families.py); leave attention out"
        )
    output = couplings[0].attention.output if couplings is not None else None
    taps = [
        find_taps(
            model.model.get_input_embeddings(),
            [model.model.get_submodule(model.path(block)) for block in student.blocks],
            output,
        )
        for model in (student, teacher)
    ]
    return Distillation(student.model, teacher.model, (taps[0], taps[1]), sorted(settings.terms))


def _curve(losses: list[StepLoss]) -> dict[str, Any]:
    """The losses of all steps of a segment, by term, as plain lists."""
    return {
        "start": losses[0].step,
        "losses": [loss.loss for loss in losses],
        "terms": {str(term): [loss.terms[term] for loss in losses] for term in losses[0].terms},
        "gradient_norms": [loss.gradient_norm for loss in losses],
    }


class _SegmentProgress:
    """Says how far a segment is: loss, speed and time left of all segments."""

    def __init__(self, settings: RecoverySettings, steps: range) -> None:
        self._settings, self._steps = settings, steps
        self._begun = time.perf_counter()

    def __call__(self, loss: StepLoss) -> None:
        done = loss.step + 1 - self._steps.start
        each = (time.perf_counter() - self._begun) / done
        left = each * (self._settings.steps - loss.step - 1)
        speed = self._settings.batch_tokens / each
        label = f"recovery: loss {loss.loss:.3f}, {speed:,.0f} tokens/s, {int(left) // 60}:{int(left) % 60:02d} left"
        report(label, done, len(self._steps))
