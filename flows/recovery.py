"""The recovery flow: rows of a text → segments of training → new weights for what pruning left → evaluation.

The state before is left as it is unless training made it better: by the loss of rows that were held out from training,
not by the evaluation windows, which would then no longer be unseen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flows.records import named_results
from flows.recovery_facts import recovery_facts, untouched_facts
from flows.session import Session
from surgeon.choices import Keep, Recovery
from surgeon.recovery.settings import RecoverySettings
from surgeon.store import Reference, is_promised
from surgeon.text import TextSpec
from tasks.calibration import require_length, require_separate
from tasks.context import Context, ModelState
from tasks.corpus import CORPUS, corpus_request, corpus_task
from tasks.evaluation import evaluation_task
from tasks.recovery import RECOVERED, recovered_state, recovered_task
from tasks.stage import Outcome, Product, Request, Stage, produce
from tasks.training import TRAINING, RecoveryWork, segment_name, training_request, training_task

RECOVERY = Stage("recovery", 1, ())
"""A finished recovery: which state it ended with. It lets a finished one be found with one look-up."""


@dataclass(frozen=True)
class Recovered:
    """What recovery came to.

    Attributes:
        state: the model after it; the one before, where training made nothing better or nothing was asked for.
        references: all results by readable name.
        facts: what the stage found; empty where results are only planned.
    """

    state: ModelState
    references: dict[str, Reference]
    facts: dict[str, Any]


def recover(session: Session, state: ModelState) -> Recovered:
    """Trains a pruned model as the parameters say, and evaluates it before and after.

    Args:
        session: parameters and engine.
        state: the pruned model.

    Raises:
        InputError: the text cannot be used.
        NonFiniteError: training diverged; what was finished before is kept.
        MemoryShortageError: there is not enough memory; likewise.
    """
    if session.params.recovery.method is Recovery.NONE:
        return Recovered(state, {}, untouched_facts(session, state))
    return RecoveryRun(session, state).run()


def recovery_settings(session: Session) -> RecoverySettings:
    """How the parameters train."""
    given = session.params
    return given.recovery.settings(batch_size=session.training_batch, seed=given.seed)


def recovery_text(session: Session) -> TextSpec:
    """What is trained on: a text of its own, or the whole calibration text."""
    return (session.params.recovery.text or session.params.calibrate.text).spec()


def check_recovery(session: Session) -> None:
    """Refuses, before any long work, to train on the evaluation text.

    Raises:
        TextError: the texts are the same, or parts of one file that overlap, or rows are longer than the model allows.
    """
    if session.params.recovery.method is not Recovery.NONE:
        require_length(session.model, recovery_settings(session).length, "recovery.length")
        require_separate(recovery_text(session), session.window_spec().text, "recovery")


def segments_found(session: Session, state: ModelState, windows: Reference) -> tuple[int, int]:
    """How many segments are in the store, and how many there will be at most; runs nothing."""
    context, store, settings = session.context, session.store, recovery_settings(session)
    request = corpus_request(context, recovery_text(session), settings, windows)
    corpus, total = store.lookup(request.key(context)), len(settings.segments)
    previous, n_found = None, 0
    while corpus is not None and n_found < total:
        work = RecoveryWork(state, corpus, settings)
        previous = store.lookup(training_request(context, work, n_found, previous).key(context))
        if previous is None:
            break
        n_found += 1
    return n_found, total


class RecoveryRun:
    """One recovery: holds what its steps share.

    Args:
        session: parameters and engine.
        state: the pruned model.
    """

    def __init__(self, session: Session, state: ModelState) -> None:
        self.session = session
        self.context: Context = session.context
        self.store = session.store
        self.state = state
        self.settings = recovery_settings(session)

    @cached_property
    def work(self) -> RecoveryWork:
        """What is trained, on what and how; makes or finds the rows."""
        arguments = (self.context, recovery_text(self.session), self.settings, self.session.windows)
        return RecoveryWork(self.state, self._task(corpus_task, *arguments, name="recovery/corpus"), self.settings)

    def run(self) -> Recovered:
        """Looks the whole recovery up, or runs what is missing of it; then evaluates it."""
        finished = self._finished()
        references, stored = finished or self._make()
        if finished is not None:
            self.session.engine.reuse([name for name in references if name.endswith(f"/{TRAINING.kind}")])
        state = ModelState.from_json(self.state.checkpoint_digest, stored.attributes["state"])
        before, after = (self._evaluated(each, name) for each, name in ((self.state, "before"), (state, "after")))
        named = {
            **references,
            "recovery/corpus": self.work.corpus,
            "recovery/record": stored,
            "recovery/before/evaluation": before,
            "recovery/after/evaluation": after,
        }
        if any(is_promised(reference.digest) for reference in named.values()):
            return Recovered(state, named, {})
        facts = recovery_facts(self.session, self.work, stored, named)
        self._warn(facts)
        return Recovered(state, named, facts)

    def _finished(self) -> tuple[dict[str, Reference], Reference] | None:
        """All results by name and the record, if nothing is missing and the weights can be read."""
        found = self.store.lookup(self._request().key(self.context))
        references = None if found is None else named_results(self.store, found, self.state.checkpoint_digest)
        return None if found is None or references is None else (references, found)

    def _request(self) -> Request:
        parameters = {
            **self.work.parameters,
            "segment_steps": self.settings.segment_steps,
            "patience": self.session.params.recovery.patience,
            "versions": {stage.kind: stage.version for stage in (CORPUS, TRAINING, RECOVERED)},
        }
        return Request(RECOVERY, parameters, self.work.inputs, "recovery/record")

    def _make(self) -> tuple[dict[str, Reference], Reference]:
        segments = self._segments()
        best = best_segment(segments)
        names = {segment_name(index): segment for index, segment in enumerate(segments)}
        state = self.state
        if best is not None:
            self._require_arrays(segments[: best + 1])
            arguments = (self.context, self.work, segments[best])
            weights = self._task(recovered_task, *arguments, name=f"recovery/{RECOVERED.kind}")
            names |= {reference.label: reference for reference in weights}
            state = recovered_state(self.context, self.work, weights)
        record = {
            "names": {name: reference.key for name, reference in names.items()},
            "best": best,
            "state": state.to_json(),
        }
        stored = produce(self.context, self._request(), lambda: Product({}, record), self.store).value
        if self.session.params.run.keep is not Keep.ALL:
            self._evict(segments)
        return names, stored

    def _segments(self) -> list[Reference]:
        """Trains to the end, or until the validation loss has not fallen for a while."""
        done: list[Reference] = []
        for index in range(len(self.settings.segments)):
            done.append(self._segment(index, done))
            if self._is_over(done):
                break
            if self.session.params.run.keep is not Keep.ALL:
                best = best_segment(done)
                self._evict([segment for place, segment in enumerate(done[:-1]) if place != best])
        return done

    def _segment(self, index: int, before: Sequence[Reference]) -> Reference:
        """A segment that is known, with or without its arrays, or else is trained now."""
        previous = before[-1] if before else None
        found = self.store.lookup(training_request(self.context, self.work, index, previous).key(self.context))
        if found is not None:
            self.session.engine.reuse([segment_name(index)])
            return found
        self._require_arrays(before)
        trained: Reference = self._task(
            training_task, self.context, self.work, index, previous, name=segment_name(index)
        )
        return trained

    def _require_arrays(self, segments: Sequence[Reference]) -> None:
        """Trains again what was dropped and is needed, from the last segment before it that is there."""
        there = [self.store.has_payload(segment.key) for segment in segments]
        if not segments or there[-1]:
            return
        first = len(there) - there[::-1].index(True) if True in there else 0
        for index in range(first, len(segments)):
            previous = segments[index - 1] if index else None
            self._task(training_task, self.context, self.work, index, previous, name=segment_name(index))

    def _is_over(self, segments: Sequence[Reference]) -> bool:
        patience = self.session.params.recovery.patience
        if patience is None or any(is_promised(segment.digest) for segment in segments):
            return False
        best = best_segment(segments)
        return len(segments) - 1 - (-1 if best is None else best) >= patience

    def _evict(self, segments: Sequence[Reference]) -> None:
        """Drops parameters and moments; losses stay, and so does what is made of the parameters."""
        for segment in segments:
            if self.store.has_payload(segment.key):
                self.store.evict(segment.key)

    def _evaluated(self, state: ModelState, name: str) -> Reference:
        label = f"recovery/{name}"
        found: Reference = self._task(
            evaluation_task, self.context, state, self.session.windows, label, name=f"{label}/evaluation"
        )
        return found

    def _warn(self, facts: dict[str, Any]) -> None:
        """Says what must not go unseen: training that did not help, by either measure."""
        validation, before, after = facts["validation"], facts["before"]["perplexity"], facts["after"]["perplexity"]
        if not facts["accepted"]:
            lowest = min(point["loss"] for point in validation[1:])
            self.session.warn(
                f"recovery did not help: the validation loss was {validation[0]['loss']:.4f} before and at best "
                f"{lowest:.4f} after; the pruned weights stay as they were. Try another recovery.learning_rate, or "
                "more recovery.tokens."
            )
        elif after > before:
            self.session.warn(
                f"recovery lowered the validation loss but raised the perplexity of the evaluation windows from "
                f"{before:.2f} to {after:.2f}: the recovery text may be too unlike them. Try another recovery.text, or "
                "a lower recovery.learning_rate."
            )

    def _task(self, body: Callable[..., Outcome[Any]], *args: Any, name: str) -> Any:
        return self.session.engine.task(body, *args, name=name)


def best_segment(segments: Sequence[Reference]) -> int | None:
    """Index of the segment after which the validation loss was lowest; None if it was lowest before the first.

    Of segments that are only planned, the last.
    """
    if any(is_promised(segment.digest) for segment in segments):
        return len(segments) - 1
    losses = [float(segment.attributes["validation_loss"]) for segment in segments]
    best = min(range(len(losses)), key=losses.__getitem__)
    return best if losses[best] < float(segments[0].attributes["validation_before"]) else None
