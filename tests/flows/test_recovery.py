"""Recovery as a stage: what it reuses, where it goes on, what it keeps, what it refuses."""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.manifest import read_references
from flows.params import Params
from flows.planning import dry_run
from flows.prune import prune
from flows.recovery import check_recovery, recover, segments_found
from flows.session import Session
from flows.stages import run_all
from flows.states import final_state
from flows.workspace import Workspace
from surgeon.errors import InputError, NonFiniteError, TextError
from tasks.stage import read_arrays
from tests.flows.project import Project
from tests.flows.sessions import Recorder, StoppedError, small_inputs

pytestmark = pytest.mark.usefixtures("in_process")

PRUNING = {"structure": "units", "widths": "free", "sparsity": 0.3, "shots": 1}
TRAINING: dict[str, Any] = {
    "method": "full",
    "tokens": 6 * 128,
    "length": 16,
    "batch_tokens": 128,
    "learning_rate": 3e-3,
    "warmup": 1,
    "evaluate_every": 2,
    "validation_tokens": 128,
}


class Recoveries:
    """Sessions that prune the same model and recover it in several ways, in one store."""

    def __init__(self, params: dict[str, Any], root: Path) -> None:
        self.params, self.root = params, root

    def session(self, stop_after: int | None = None, prune: dict[str, Any] | None = None, **recovery: Any) -> Session:
        sections = self.params | {"recovery": TRAINING | recovery}
        sections["prune"] = PRUNING | (prune or {})
        if "keep" in recovery:
            sections["run"] = self.params["run"] | {"keep": recovery.pop("keep")}
            sections["recovery"].pop("keep")
        warned: list[str] = []
        session = Session(Params.model_validate(sections), Workspace(self.root), Recorder(), warn=warned.append)
        session.check()
        self.pruned = session.healed(lambda: prune_state(session))
        session.engine = Recorder(stop_after)
        self.warned, self.ran = warned, session.engine.ran
        return session

    def recover(self, stop_after: int | None = None, **recovery: Any) -> Any:
        session = self.session(stop_after, **recovery)
        return recover(session, self.pruned)


def prune_state(session: Session) -> Any:
    return prune(session)[-1].state


@pytest.fixture
def runs(small: dict[str, Any], tmp_path: Path) -> Recoveries:
    return Recoveries(small, tmp_path / "project")


def kinds(ran: list[str]) -> Counter[str]:
    return Counter(name.rpartition("/")[2] for name in ran)


def weights(session: Session, state: Any) -> dict[str, bytes]:
    arrays = {}
    for block, update in enumerate(state.updates):
        arrays |= {f"{block}/{n}": a.tobytes() for n, a in read_arrays(session.context, update.key).items()}
    return arrays


def test_training_lowers_both_losses_and_keeps_what_is_gone(runs: Recoveries) -> None:
    session = runs.session()
    recovered = recover(session, runs.pruned)
    facts = recovered.facts
    assert kinds(runs.ran) == {"corpus": 1, "training": 3, "recovered": 1, "evaluation": 1}
    assert facts["accepted"]
    assert (facts["steps"], facts["tokens"], facts["stopped_early"]) == (6, 768, False)
    assert facts["validation"][-1]["loss"] < facts["validation"][0]["loss"] - 0.02
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert [point["step"] for point in facts["curve"]] == [0, 1, 2, 3, 4, 5]
    assert facts["n_trained"] == facts["n_parameters"] < session.model.n_parameters  # units are really gone
    assert facts["after"]["linear_nonzero"] <= facts["before"]["linear_nonzero"]
    assert recovered.state.trunk is not None
    for block, (old, new) in enumerate(zip(runs.pruned.updates, recovered.state.updates, strict=True)):
        before, after = (read_arrays(session.context, part.key) for part in (old, new))
        assert set(before) < set(after)
        assert set(after) - set(before) == {n for n in after if n.startswith("other/")}
        for name, array in before.items():
            if not name.endswith(("/weight", "/bias")):
                assert array.tobytes() == after[name].tobytes(), (block, name)
            else:
                assert ((after[name] == 0) | (array != 0)).all()
                assert (after[name] != array).any()
    assert not runs.warned


@pytest.mark.parametrize(
    "recovery",
    [
        {"method": "lora", "learning_rate": 1e-2, "rank": 2},
        {"method": "lora", "learning_rate": 1e-2, "terms": {"kl": 1.0}},
        {"method": "distill"},
        {"method": "distill", "terms": {"hidden": 0, "attention": 0, "embedding": 0}},
    ],
    ids=["lora", "lora beside the dense model", "distill", "logits alone"],
)
@pytest.mark.parametrize("structure", ["units", "rows-and-columns", "2:4"])
def test_methods_and_structures(runs: Recoveries, recovery: dict[str, Any], structure: str) -> None:
    changes = {"structure": structure, "sparsity": None if structure == "2:4" else 0.3}
    changes["widths"] = "free" if structure == "units" else None
    session = runs.session(prune=changes, **recovery)
    recovered = recover(session, runs.pruned)
    assert recovered.facts["accepted"]
    assert recovered.facts["validation"][-1]["loss"] < recovered.facts["validation"][0]["loss"]
    assert (recovered.state.trunk is None) == (recovery["method"] == "lora")
    assert (recovered.facts["memory"]["teacher_gib"] > 0) == (
        recovery.get("terms") is not None or "distill" in recovery["method"]
    )
    for old, new in zip(runs.pruned.updates, recovered.state.updates, strict=True):
        before, after = (read_arrays(session.context, part.key) for part in (old, new))
        for name, array in before.items():
            if name.endswith("/weight"):
                live = alive(before, name, session.model.blocks[0])
                assert array[~live].tobytes() == after[name][~live].tobytes()
                assert (array != after[name])[live].mean() > 0.5
    terms = recovered.facts["terms"]
    assert all(len(values) == 6 for values in terms.values())
    assert ("kl" in terms) == (recovered.facts["memory"]["teacher_gib"] > 0)


def alive(arrays: dict[str, Any], name: str, shapes: Any) -> Any:
    """Which weights of a linear live."""
    linear = name.removesuffix("/weight")
    place = [shape.name for shape in shapes].index(linear)
    ends = [np.cumsum([0, *(getattr(s, side) for s in shapes)]) for side in ("n_out", "n_in")]
    rows, columns = (
        arrays[part][end[place] : end[place + 1]] for part, end in zip(("live_rows", "live_columns"), ends, strict=True)
    )
    mask = rows[:, None] & columns[None, :]
    if f"{linear}/live" in arrays:
        mask = np.unpackbits(arrays[f"{linear}/live"], axis=1, count=shapes[place].n_in).astype(bool)
    return mask


def test_a_second_run_finds_everything(runs: Recoveries) -> None:
    first = runs.recover()
    second = runs.recover()
    assert runs.ran == []
    assert (second.state, second.facts) == (first.state, first.facts)
    assert second.references.keys() == first.references.keys()


def test_it_goes_on_after_the_last_segment(runs: Recoveries, small: dict[str, Any], tmp_path: Path) -> None:
    whole = Recoveries(small, tmp_path / "whole")
    expected = whole.recover()
    with pytest.raises(StoppedError, match="segment-003"):
        runs.recover(stop_after=3)
    session = runs.session()
    assert segments_found(session, runs.pruned, session.windows) == (2, 3)
    again = recover(session, runs.pruned)
    assert segments_found(session, runs.pruned, session.windows) == (3, 3)
    assert kinds(runs.ran) == {"training": 1, "recovered": 1, "evaluation": 1}
    assert again.state == expected.state
    assert again.facts == expected.facts


@pytest.mark.parametrize("keep", ["last", "none", "all"])
def test_what_is_kept(runs: Recoveries, keep: str) -> None:
    session = runs.session(keep=keep)
    recovered = recover(session, runs.pruned)
    store = session.context.store.open()
    segments = [ref for name, ref in sorted(recovered.references.items()) if ref.kind == "training"]
    assert [store.has_payload(ref.key) for ref in segments] == [keep == "all"] * 3
    store.evict(next(ref.key for name, ref in recovered.references.items() if ref.kind == "recovered"))
    again = recover(runs.session(keep=keep), runs.pruned)  # trains again for weights that are gone
    assert (again.state, again.facts) == (recovered.state, recovered.facts)
    assert kinds(runs.ran)["training"] == (0 if keep == "all" else 3)


def test_training_that_harms_leaves_the_pruned_weights(runs: Recoveries) -> None:
    recovered = runs.recover(learning_rate=3.0, warmup=0)
    assert not recovered.facts["accepted"]
    assert recovered.state == runs.pruned
    assert recovered.facts["after"] == recovered.facts["before"]
    assert recovered.facts["best_step"] == 0
    (warned,) = runs.warned
    assert warned.startswith("recovery did not help: the validation loss was")
    assert "the pruned weights stay as they were" in warned
    assert kinds(runs.ran)["recovered"] == 0


def test_the_best_segment_is_taken(runs: Recoveries) -> None:
    """A rate at which it gets better, and then worse: with a longer schedule the state in between is kept."""
    recovered = runs.recover(learning_rate=8e-2, warmup=4, tokens=10 * 128, evaluate_every=1)
    losses = [point["loss"] for point in recovered.facts["validation"]]
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1, losses
    assert recovered.facts["best_step"] == best
    stopped = runs.recover(learning_rate=8e-2, warmup=4, tokens=10 * 128, evaluate_every=1, patience=2)
    assert stopped.facts["stopped_early"]
    assert stopped.facts["steps"] < 10
    assert kinds(runs.ran)["training"] == 0  # the same segments, found


def test_a_loss_that_is_not_finite_names_the_step(runs: Recoveries) -> None:
    with pytest.raises(
        NonFiniteError, match=r"in step \d of recovery is (nan|inf).*Try a lower recovery\.learning_rate"
    ):
        runs.recover(learning_rate=1e30, warmup=0, clip=1e30)


def test_dry_run_is_what_runs(runs: Recoveries) -> None:
    session = runs.session()
    planned, _ = dry_run(session, whole=True)
    names = [step.name for step in planned.steps if step.stage == "recovery"]
    recover(session, runs.pruned)
    assert [name for name in names if name != "recovery/before/evaluation"] == runs.ran
    assert "recovery/before/evaluation" not in names
    planned, _ = dry_run(session, whole=True)
    assert not [step.name for step in planned.steps if step.stage == "recovery"]


def test_the_evaluation_text_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    def session(text: str) -> Session:
        sections = small | {"recovery": TRAINING | {"text": {"source": text}}}
        sections["prune"] = PRUNING
        return Session(Params.model_validate(sections), Workspace(tmp_path / "project"), Recorder())

    evaluation = Path(small["evaluate"]["text"]["source"])
    same = tmp_path / "same.txt"
    shutil.copy(evaluation, same)
    with pytest.raises(TextError, match="Both texts hold the same characters: recovery on"):
        check_recovery(session(str(same)))
    holds = tmp_path / "holds.txt"
    holds.write_text(Path(small["calibrate"]["text"]["source"]).read_text() + evaluation.read_text())
    with pytest.raises(TextError, match="of the evaluation tokens occur word for word in the recovery corpus"):
        recover(session(str(holds)), session(str(holds)).dense)
    with pytest.raises(ValueError, match=r"recovery\.text and evaluate\.text are the same source and split"):
        session(str(evaluation))


def test_the_pipeline_exports_what_was_recovered(small: dict[str, Any], tmp_path: Path) -> None:
    sections = small | {"recovery": TRAINING, "prune": PRUNING}
    session = Session(Params.model_validate(sections), Workspace(tmp_path / "project"), Recorder())
    session.check()
    results = run_all(session)
    recovery = results["recovery"]
    assert recovery["accepted"]
    assert results["pruned"]["perplexity"] == recovery["after"]["perplexity"] < recovery["before"]["perplexity"]
    assert results["weights_digest"] == final_state(session).digest
    assert recovery["tokens_per_s"] > 0
    card = (session.workspace.export / "README.md").read_text()
    assert "Then trained (full) to step" in card
    page = session.workspace.report.read_text()
    assert 'id="recovery"' in page
    assert f"{recovery['n_trained']:,} numbers trained on 768 tokens" in page
    references = read_references(session.workspace)
    assert references is not None
    assert {name for name in references if name.startswith("recovery/")} >= {"recovery/record", "recovery/corpus"}
    shutil.rmtree(session.workspace.data / "timings")
    other = Session(
        session.params.model_copy(update={"recovery": session.params.recovery.model_copy(update={"clip": 2.0})}),
        session.workspace,
        Recorder(),
    )
    with pytest.raises(
        InputError, match="the last recovery stage ran on another pruned model, or with other parameters"
    ):
        final_state(other)


def test_killed_in_training_it_ends_with_the_same_bits(small: dict[str, Any], tmp_path: Path) -> None:
    """A real process, killed with signal 9 while it trains."""
    params = small | {
        "recovery": TRAINING | {"tokens": 40 * 128, "evaluate_every": 2},
        "prune": PRUNING,
    }
    whole, killed = (Project(tmp_path / name, params) for name in ("whole", "killed"))
    whole.surgeon("run", "--quiet").ok()
    started = killed.start("run", "--quiet")
    while started.process.is_alive() and sum("training" in label for label in killed.labels().values()) < 4:
        time.sleep(0.001)
    started.kill()
    assert started.wait().status == -9
    assert 4 <= sum("training" in label for label in killed.labels().values()) < 20
    killed.surgeon("run", "--quiet").ok()
    first, second = whole.read("stages/recovery.json"), killed.read("stages/recovery.json")
    assert first == second
    assert killed.contents() == whole.contents()


@pytest.mark.parametrize("method", ["full", "lora", "distill"])
def test_a_model_without_some_blocks(tmp_path: Path, method: str) -> None:
    """Nothing is pruned in the blocks that are left; they are compared with those that they were."""
    rate = 1e-2 if method == "lora" else 3e-3
    sections = small_inputs(tmp_path, n_blocks=3) | {
        "recovery": TRAINING | {"method": method, "learning_rate": rate},
        "prune": PRUNING,
    }
    session = Session(Params.model_validate(sections), Workspace(tmp_path / "project"), Recorder())
    session.check()
    state = session.dense.without([1])
    recovered = recover(session, state)
    assert recovered.facts["accepted"]
    assert recovered.facts["validation"][-1]["loss"] < recovered.facts["validation"][0]["loss"]
    assert recovered.state.removed == (1,)
    assert recovered.state.updates[1] is None
    for block in (0, 2):
        update = recovered.state.update_of(block)
        assert update is not None
        arrays = read_arrays(session.context, update.key)
        assert arrays["live_rows"].all()
        assert arrays["live_columns"].all()
    assert recovered.facts["after"]["loss"] != recovered.facts["before"]["loss"]
