"""Every method, structure and curvature through the whole flow of pruning, on a tiny model, in this process."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from flows.render import render_results
from flows.shot import Shot
from flows.stages import run_all
from surgeon.choices import Allocation, Curvature, Method, Structure
from surgeon.errors import ParameterError
from surgeon.preferences import Preferences
from surgeon.presets import WITHOUT_CURVATURE
from surgeon.pruning.granularity import NMPattern, is_structured
from surgeon.recipe import resolve
from tasks.units import block_sub_layers
from tests.flows.project import slow
from tests.flows.sessions import Pruned, Runs, StoppedError, small_inputs

GRANULARITIES = (*(s for s in Structure if s is not Structure.BLOCKS), NMPattern(2, 4))
PASSES = ("curvature", "loss-gradient", "moments", "kronecker-terms", "boundary")
"""Kinds of tasks that run the model on the calibration sequences."""


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters of runs on three blocks."""
    return small_inputs(tmp_path_factory.mktemp("three"), n_blocks=3)


@pytest.fixture(scope="module")
def shared(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that share what they have in common."""
    return Runs(small, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def fresh(small: dict[str, Any], tmp_path: Path) -> Runs:
    return Runs(small, tmp_path / "project")


def combinations() -> list[dict[str, Any]]:
    """Every method with every structure and curvature it allows."""
    found = []
    for method in Method:
        for granularity in GRANULARITIES:
            for curvature in Curvature:
                try:
                    resolve(Preferences(method=method, granularity=granularity, curvature=curvature))
                except ParameterError:
                    continue
                found.append({"method": str(method), "structure": str(granularity), "curvature": str(curvature)})
    return found


VARIANTS: list[dict[str, Any]] = [
    {"structure": "rows-and-columns", "update": "independent"},
    {"structure": "rows", "allocation": "per-layer", "cost": "obd"},
    {"structure": "weights", "update": "chunked", "max_correlate": 50},
    {"structure": "weights", "update": "none", "allocation": "per-row"},
    {"structure": "weights", "targets": "sampled", "draws": 2, "allocation": "per-layer"},
    {"structure": "weights", "curvature": "kronecker-sum", "rank": 3, "power_iterations": 1},
    {"structure": "weights", "method": "sparsegpt", "max_correlate": 5},
    {"structure": "2:4", "update": "chunked", "sparsity": 0.3},
    {"structure": "1:8", "cost": "obd"},
    {"structure": "4:8", "method": "sparsegpt"},
    {"structure": "columns", "correction": "newton"},
    {"structure": "2:4", "correction": "adapters"},
]
SELDOM = [VARIANTS[i] for i in (1, 5, 6, 9)]
"""Variants that a quick run leaves out."""
ALWAYS = (
    *("magnitude weights identity", "l-obd columns activations", "k-obd 2:4 kfac"),
    *("wanda weights activations", "wanda 2:4 activations", "sparsegpt weights activations"),
    *("llm-surgeon rows-and-columns ekfac", "llm-surgeon weights kfac", "llm-surgeon 2:4 ekfac"),
    *("llm-surgeon units kfac", "l-obd units activations"),
    *("llm-surgeon rows diagonal", "llm-surgeon weights kronecker-sum", "llm-surgeon columns nearest-kronecker"),
)
"""Combinations that a quick run has too; each name of a method, structure and curvature is among them."""


def named(settings: dict[str, Any]) -> str:
    return " ".join(str(value) for value in settings.values())


def test_combinations_are_all_there() -> None:
    names = {named(settings) for settings in combinations()}
    # Three methods with one curvature and all structures, two for single weights, and all curvatures of llm-surgeon.
    assert len(names) == 3 * 6 + 2 * 2 + 6 * 7
    assert set(ALWAYS) <= names
    parts = {part for name in ALWAYS for part in name.split()}
    assert parts == {
        *(set(Method) - set(WITHOUT_CURVATURE)),
        *(str(granularity) for granularity in GRANULARITIES),
        *Curvature,
    }


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, id=named(s), marks=() if named(s) in ALWAYS else pytest.mark.slow) for s in combinations()]
    + [pytest.param(s, id=named(s), marks=pytest.mark.slow if s in SELDOM else ()) for s in VARIANTS],
)
def test_two_shots(shared: Runs, settings: dict[str, Any]) -> None:
    structured = settings["structure"] in ("units", "rows", "columns", "rows-and-columns")
    settings = {"sparsity": 0.3 if structured else 0.45} | settings
    if settings["structure"] == "units":
        settings |= {"widths": "free", "multiple": 1}
    if ":" in settings["structure"] and settings["sparsity"] == 0.45:
        settings["sparsity"] = None
    done = shared.prune(shots=2, **settings)
    first, second = (done.linears(shot.state) for shot in done.shots)
    for place, before in first.items():
        assert not (second[place].alive() & ~before.alive()).any(), "what is gone stays gone"
    for shot, linears in zip(done.shots, (first, second), strict=True):
        assert math.isfinite(shot.evaluation.attributes["perplexity"])
        for linear in linears.values():
            assert torch.isfinite(linear.weight).all()
            assert not linear.weight[~linear.alive()].any(), "zero to the bit"
        assert_sparsity(done, shot, linears)
    assert_changed(first, second)


def assert_sparsity(done: Pruned, shot: Shot, linears: dict[Any, Any]) -> None:
    """The target is met, by less than one structure too many; by none where single weights go.

    Where more is dead than was asked for, nothing else goes.
    """
    recipe, target, reached = done.session.recipe, shot.target, shot.record["sparsity"]
    masks = [linear.alive() for linear in linears.values()]
    n_weights, n_gone = sum(m.numel() for m in masks), sum(int((~m).sum()) for m in masks)
    assert reached == pytest.approx(n_gone / n_weights, abs=1e-12)
    assert reached >= target - 1e-12
    if is_structured(recipe.granularity):
        per_linear = recipe.allocation is Allocation.PER_LAYER
        most = sum(max(m.shape) for m in masks) if per_linear else max(max(m.shape) for m in masks)
        if recipe.granularity is Structure.UNITS:
            most = max(sub.weights_per_unit for sub in block_sub_layers(done.session.model, 0))
        assert n_gone - target * n_weights < most or shot.record["n_removed"] == 0
        return
    assert n_gone == sum(expected_weights(done, target, [m.shape for m in masks]))
    pattern = recipe.granularity
    if isinstance(pattern, NMPattern):
        zeros = torch.cat([(~m).reshape(-1, pattern.m).sum(dim=1) for m in masks])
        assert set(zeros.tolist()) == ({pattern.n} if target == pattern.sparsity else {0, pattern.n})


def expected_weights(done: Pruned, target: float, shapes: list[torch.Size]) -> list[int]:
    """How many weights have to go, of everything, of each linear or of each row, in groups of N for N:M."""
    recipe = done.session.recipe
    pattern = recipe.granularity if isinstance(recipe.granularity, NMPattern) else None
    size = pattern.n if pattern else 1

    def needed(n_weights: int) -> int:
        return math.ceil(round(target * n_weights / size, 9)) * size

    if pattern and recipe.method is Method.SPARSEGPT:  # so many rows of each column of groups
        share = target / pattern.sparsity
        return [math.ceil(round(share * rows, 9)) * (columns // pattern.m) * size for rows, columns in shapes]
    if recipe.allocation is Allocation.GLOBAL:
        return [needed(sum(shape.numel() for shape in shapes))]
    if recipe.allocation is Allocation.PER_LAYER:
        return [needed(shape.numel()) for shape in shapes]
    return [rows * needed(columns) for rows, columns in shapes]


def assert_changed(first: dict[Any, Any], second: dict[Any, Any]) -> None:
    """The second shot took something, or the first had all there was to take."""
    assert sum(int(v.alive().sum()) for v in second.values()) < sum(int(v.alive().sum()) for v in first.values())


ANSWERS: dict[str, dict[str, Any]] = {
    "another sparsity": {"sparsity": 0.3},
    "another structure": {"structure": "rows"},
    "weights": {"structure": "weights"},
    "N:M": {"structure": "2:4"},
    "another damping": {"damping": 0.05},
    "another ranking": {"ranking": "cost"},
    "another allocation": {"allocation": "per-layer"},
    "k-obd": {"method": "k-obd"},
    "l-obd": {"method": "l-obd"},
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "structure": "weights"},
    "sparsegpt": {"method": "sparsegpt", "structure": "weights"},
    "no update": {"update": "none"},
    "independent": {"update": "independent"},
    "activations": {"curvature": "activations"},
}


@pytest.fixture(scope="module")
def measured(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A store with the statistics of K-FAC of the dense model."""
    runs = Runs(small, tmp_path_factory.mktemp("measured"))
    first = runs.prune(shots=1)
    assert first.kinds() == {"curvature": 1, "costs": 2, "mask": 1, "update": 2, "evaluation": 1}
    return runs


@pytest.mark.parametrize("answer", ANSWERS)
def test_one_set_of_statistics_gives_many_answers(measured: Runs, answer: str) -> None:
    done = measured.prune(shots=1, **ANSWERS[answer])
    assert done.kinds()["update"] > 0, "another question"
    assert not set(done.kinds()) & set(PASSES)


def test_ekfac_after_kfac_measures_moments_alone(measured: Runs) -> None:
    done = measured.prune(shots=1, curvature="ekfac")
    assert set(done.kinds()) & set(PASSES) == {"moments"}


def test_kfac_after_wanda_keeps_the_input_factors(fresh: Runs) -> None:
    def inputs() -> dict[str, float]:
        found = [r for r in fresh.store.entries() if r.kind == "input-factors"]
        return {r.digest: fresh.store.path(r.key).stat().st_mtime for r in found}

    wanda = fresh.prune(shots=1, method="wanda", structure="weights")
    before = inputs()
    assert len(before) == 2
    assert not [r for r in fresh.store.entries() if r.kind == "output-factors"], "no gradients were asked for"
    kfac = fresh.prune(shots=1)
    assert kfac.kinds()["curvature"] == 1
    assert inputs() == before
    name = "shot-01/block-01/input-factors"
    assert kfac.digests[name] == wanda.digests[name]


WEIGHTS = {"structure": "weights", "sparsity": 0.45, "shots": 2, "max_iterations": 5}
PATTERN = {"structure": "2:4", "shots": 2, "max_iterations": 5}
N_TASKS = 2 + 2 * 7
"""Sequences and windows; shots of curvature, 2 costs, mask, 2 updates and evaluation."""


@pytest.fixture(scope="module")
def undisturbed(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pruned]:
    runs = Runs(small, tmp_path_factory.mktemp("undisturbed"))
    return {settings["structure"]: runs.prune(**settings) for settings in (WEIGHTS, PATTERN)}


@pytest.mark.parametrize("settings", [WEIGHTS, PATTERN], ids=["weights", "2:4"])
@pytest.mark.parametrize("k", [2, slow(4), slow(6), 11, slow(13)])
def test_an_interrupted_run_does_only_what_is_missing(
    fresh: Runs, undisturbed: dict[str, Pruned], settings: dict[str, Any], k: int
) -> None:
    with pytest.raises(StoppedError):
        fresh.prune(stop_after=k, **settings)
    done = fresh.prune(**settings)
    assert len(done.ran) == N_TASKS - k
    assert done.digests == undisturbed[settings["structure"]].digests


@pytest.mark.parametrize("settings", [WEIGHTS, PATTERN], ids=["weights", "2:4"])
def test_an_update_that_fails_half_way_leaves_nothing(
    fresh: Runs, undisturbed: dict[str, Pruned], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import update

    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4 + 2:  # the second linear of the second block
            raise StoppedError
        return original(*args)

    original = update.update_weights
    with monkeypatch.context() as patch:
        patch.setattr(update, "update_weights", failing)
        with pytest.raises(StoppedError):
            fresh.prune(**settings)
    assert sum(r.kind == "update" for r in fresh.store.entries()) == 1
    done = fresh.prune(**settings)
    assert done.kinds("shot-01") == {"update": 1, "evaluation": 1}
    assert done.digests == undisturbed[settings["structure"]].digests


@pytest.mark.parametrize("keep", ["none", "last"])
@pytest.mark.parametrize("settings", [WEIGHTS, PATTERN], ids=["weights", "2:4"])
def test_dropped_costs_come_back_for_a_missing_update(
    fresh: Runs, undisturbed: dict[str, Pruned], settings: dict[str, Any], keep: str
) -> None:
    run = {"keep": keep}
    done = fresh.prune(run=run, **settings)
    assert done.digests == undisturbed[settings["structure"]].digests
    dropped = {name.rpartition("/")[2] for name, r in done.references.items() if not fresh.store.has_payload(r.key)}
    assert dropped == {"input-factors", "output-factors", "costs"}
    assert fresh.prune(run=run, **settings).ran == []
    fresh.store.quarantine(done.references["shot-01/block-01/update"].key)
    again = fresh.prune(run=run, **settings)
    assert again.ran == ["shot-01/block-00/curvature", "shot-01/block-01/costs", "shot-01/block-01/update"]
    assert again.digests == done.digests


def test_costs_of_rows_and_columns_are_not_dropped(fresh: Runs) -> None:
    run = {"keep": "none"}
    fresh.prune(run=run, shots=1)
    assert fresh.prune(run=run, shots=1, sparsity=0.1, update="none").kinds()["costs"] == 0


def test_costs_that_ignore_damping_do_not_name_it(fresh: Runs) -> None:
    """They are found under any damping, and come back the same when they were dropped."""
    settings = {"shots": 1, "structure": "weights", "cost": "obd", "max_iterations": 5}
    fresh.prune(run={"keep": "none"}, **settings)
    again = fresh.prune(run={"keep": "none"}, damping=0.05, **settings)
    assert again.kinds() == {"curvature": 1, "costs": 2, "update": 2, "evaluation": 1}


@pytest.mark.parametrize(
    "settings", [WEIGHTS, PATTERN, {"structure": "rows", "shots": 1}], ids=["weights", "2:4", "rows"]
)
def test_export_loads_back_with_the_zeros(fresh: Runs, settings: dict[str, Any]) -> None:
    dense = Runs(fresh.params | {"export": {"layout": "dense"}}, fresh.root)
    session = dense.session(settings)
    results = run_all(session)
    assert results["export"]["layout"] == "dense"
    done = fresh.prune(**settings)
    assert done.ran == []
    model = AutoModelForCausalLM.from_pretrained(session.workspace.export)
    tensors = model.state_dict()
    n_zeros = 0
    for (block, name), linear in done.linears(done.shots[-1].state).items():
        weight = tensors[f"{session.model.blocks_path}.{block}.{name}.weight"]
        assert torch.equal(weight, linear.weight)
        assert torch.equal(weight == 0, ~linear.alive())
        n_zeros += int((weight == 0).sum())
        if settings["structure"] == "2:4":
            assert ((weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
    assert n_zeros / session.model.n_weights == pytest.approx(results["pruned"]["sparsity"], abs=1e-12)
    assert results["pruned"]["linear_nonzero"] == session.model.n_weights - n_zeros


GROUPED = [
    {"structure": "rows-and-columns", "curvature": "ekfac"},
    {"structure": "weights", "curvature": "kronecker-sum", "max_iterations": 5},
    {"structure": "2:4", "method": "sparsegpt"},
]


@pytest.mark.parametrize("settings", GROUPED, ids=[named(s) for s in GROUPED])
def test_grouping_of_blocks_changes_no_digest(
    three_blocks: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    found = {}
    for n in (1, 2, 3):
        done = Runs(three_blocks, tmp_path / str(n)).prune(run={"blocks_per_group": n}, shots=1, **settings)
        assert done.kinds()["boundary"] == {1: 2, 2: 1, 3: 0}[n]
        found[n] = done.digests | {"evaluation": done.shots[0].evaluation.digest}
    assert found[1] == found[2] == found[3]


def test_linears_that_did_not_converge_are_reported(fresh: Runs) -> None:
    results = run_all(fresh.session({"structure": "weights", "shots": 2, "max_iterations": 1}))
    for shot in results["shots"]:
        found = shot["convergence"]
        assert set(found) == {"linears", "not_converged", "worst_residual", "iterations"}
        assert (found["linears"], found["iterations"]) == (8, 8)
        assert found["not_converged"] == 8
        assert 1e-3 < found["worst_residual"] < 1
    text = rendered(results)
    assert "shot 1: conjugate gradients did not reach prune.tolerance in 8 of 8 linears (worst residual " in text
    assert "shot 2: " in text


def test_linears_that_converged_need_no_line(fresh: Runs) -> None:
    results = run_all(fresh.session({"structure": "weights", "shots": 1, "max_iterations": 9, "tolerance": 1.0}))
    assert results["shots"][0]["convergence"]["not_converged"] == 0
    assert "conjugate gradients" not in rendered(results)


def rendered(results: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    render_results(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
