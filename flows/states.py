"""The states that stages hand to each other, from what they wrote down."""

from typing import Any

from flows.recovery_facts import untouched_facts
from flows.session import Session
from flows.stage_facts import stage_facts
from surgeon.choices import Recovery
from surgeon.errors import InputError
from tasks.context import ModelState


def pruned_state(session: Session) -> ModelState:
    """The state after the last shot, from what the prune stage wrote down.

    Raises:
        InputError: if the prune stage has not run, or ran on another model.
    """
    facts = stage_facts(session, "prune")
    source = facts["parameters"]["model"]["source"]
    if facts["model_digest"] != session.checkpoint.digest:
        raise InputError(
            f"the last prune stage ran on another model ({source!r}, now {session.params.model.source!r}); "
            f"run `surgeon prune` for this one, or give -S model.source={source}"
        )
    return ModelState.from_json(session.checkpoint.digest, facts["state"])


def final_state(session: Session) -> ModelState:
    """The state that is exported: after recovery, which may have left it as pruning did.

    Raises:
        InputError: as `recovery_found`.
    """
    return ModelState.from_json(session.checkpoint.digest, recovery_found(session)["state"])


def recovery_found(session: Session) -> dict[str, Any]:
    """Facts of the recovery stage; where nothing is trained it need not have run.

    Raises:
        InputError: the stage has not run since the model was pruned, or ran with other parameters.
    """
    pruned, given = pruned_state(session), session.params
    if given.recovery.method is Recovery.NONE:
        return untouched_facts(session, pruned)
    found = stage_facts(session, "recovery")
    wanted = given.recovery.resolved(batch_size=session.training_batch, seed=given.seed)
    if found["pruned_digest"] != pruned.digest or found["parameters"] != wanted:
        raise InputError(
            "the last recovery stage ran on another pruned model, or with other parameters: run `surgeon recovery` "
            "first, or give the same -S options"
        )
    return found
