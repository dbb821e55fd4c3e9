"""What is said of a run, linear by linear, against its weights, costs and factors, for methods and structures."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flows.anatomy import Anatomy, block_costs, read_anatomy
from flows.anatomy_facts import QUANTILES
from flows.spectra import can_be_had, spectrum_work
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.curvature.spec import Statistic
from surgeon.curvature.spectrum import Spectrum
from surgeon.errors import EvictedError, InputError
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear, without_dead
from surgeon.store import Store, StorePlace
from tasks.context import ModelState
from tasks.curvature import read_statistics
from tasks.spectra import read_spectra, spectrum_task
from tests.flows.project import slow
from tests.flows.sessions import Pruned, Runs, small_inputs
from tests.flows.test_methods import VARIANTS, combinations, named

pytestmark = pytest.mark.usefixtures("in_process")

UNITS = {"structure": "units", "multiple": 4, "widths": "free"}
QUICK = (
    *("llm-surgeon rows-and-columns kfac", "llm-surgeon weights kfac", "llm-surgeon units kfac"),
    *("wanda 2:4 activations", "sparsegpt weights activations"),
)
"""Combinations that a quick run has too."""
CASES = [pytest.param(s, id=named(s), marks=() if named(s) in QUICK else pytest.mark.slow) for s in combinations()]
CASES += [
    pytest.param(s, id=named(s), marks=() if s.get("correction") == "adapters" else pytest.mark.slow) for s in VARIANTS
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that share what they have in common."""
    folder = tmp_path_factory.mktemp("anatomy")
    return Runs(small_inputs(folder), folder / "project")


@pytest.fixture
def fresh(small: dict[str, Any], tmp_path: Any) -> Runs:
    return Runs(small, tmp_path / "project")


def two_shots(runs: Runs, settings: dict[str, Any]) -> Pruned:
    more: dict[str, Any] = UNITS if settings["structure"] == "units" else {}
    if settings["structure"] == "1:8":
        more = {"sparsity": 0.1}
    return runs.prune(**({"sparsity": 0.3, "shots": 2} | settings | more))


def before(pruned: Pruned, shot: int) -> dict[tuple[int, str], PrunedLinear]:
    """The linears before a shot."""
    dense = ModelState(pruned.session.checkpoint.digest)
    found: dict[tuple[int, str], PrunedLinear] = pruned.linears(pruned.shots[shot - 2].state if shot > 1 else dense)
    return found


def relative_change(was: PrunedLinear, now: PrunedLinear) -> float:
    """Norm of the change of all that was kept over that of all that lived."""
    kept, rows = now.alive().numpy(), now.live_rows.numpy()
    old, new = was.weight.double().numpy(), now.weight.double().numpy()
    change, norm = (((new - old) * kept) ** 2).sum(), (old**2).sum()
    if was.bias is not None and now.bias is not None:
        change += (((now.bias - was.bias).double().numpy() * rows) ** 2).sum()
        norm += (was.bias.double().numpy() ** 2).sum()
    return float(np.sqrt(change / norm)) if norm else 0.0


def found_alive(pruned: Pruned, shot: int) -> dict[tuple[int, str], PrunedLinear]:
    """The linears as a shot finds them: what no input or no gradient reaches goes first, and counts for nothing."""
    references, measured = pruned.manifest, pruned.session.measured_linears
    linears = before(pruned, shot)
    found = dict(linears)
    for block in blocks(pruned):
        place = f"shot-{shot:02d}/block-{block:02d}"
        statistics = {s: references[name] for s in Statistic if (name := f"{place}/{s}") in references}
        names = [name for b, name in linears if b == block and (measured is None or name in measured)]
        for name, factors in read_statistics(pruned.session.context, statistics, names):
            found[block, name] = without_dead(linears[block, name], factors)
    return found


def blocks(pruned: Pruned) -> range:
    return range(pruned.session.model.n_blocks)


@pytest.mark.parametrize("settings", CASES)
def test_linears_masks_and_costs(runs: Runs, settings: dict[str, Any]) -> None:
    pruned = two_shots(runs, settings)
    anatomy = read_anatomy(runs.store, pruned.manifest, 2)
    assert anatomy.missing == []
    was, now = found_alive(pruned, 2), pruned.linears(pruned.shots[-1].state)
    updates = [pruned.manifest[f"shot-02/block-{block:02d}/update"] for block in blocks(pruned)]
    updated = pruned.linears(ModelState(pruned.session.checkpoint.digest).after(updates))
    assert [(facts.block, facts.linear) for facts in anatomy.linears] == list(now)
    for facts in anatomy.linears:
        place = facts.block, facts.linear
        linear = now[place]
        n_live = int((linear.weight != 0).sum())  # random weights: only what is gone is zero
        assert (facts.n_out, facts.n_in) == tuple(linear.weight.shape)
        assert (facts.live_rows, facts.live_columns) == (int(linear.live_rows.sum()), int(linear.live_columns.sum()))
        assert facts.n_live == n_live
        assert facts.sparsity == pytest.approx(1 - n_live / linear.weight.numel(), abs=1e-15)
        assert facts.update_size == pytest.approx(relative_change(was[place], updated[place]), rel=1e-3, abs=1e-6)
        corrected = float((linear.weight - updated[place].weight).norm())
        if settings.get("correction") == "adapters":
            assert facts.correction_size == pytest.approx(corrected / float(updated[place].weight.norm()), rel=1e-4)
            assert corrected > 1e-6
        else:
            assert facts.correction_size is None
            assert corrected == 0.0
    if settings.get("method") == "sparsegpt":
        assert (anatomy.masks, anatomy.costs) == ([], [])
        return
    assert [mask.shot for mask in anatomy.masks] == [1, 2]
    assert [mask.parameters["target"] for mask in anatomy.masks] == [shot.target for shot in pruned.shots]
    for mask, shot in zip(anatomy.masks, pruned.shots, strict=True):
        assert mask.sparsity == pytest.approx(shot.record["sparsity"], abs=1e-12)
    for number in (1, 2):
        check_costs(runs.store, pruned, anatomy, number)


Candidates = dict[str, tuple[NDArray[Any], NDArray[np.bool_]]]
"""Values and which went, by what the candidates are."""


def check_costs(store: Store, pruned: Pruned, anatomy: Anatomy, shot: int) -> None:
    was, now = found_alive(pruned, shot), pruned.linears(pruned.shots[shot - 1].state)
    for block in blocks(pruned):
        expected = candidates(store, pruned, shot, block, was, now)
        found = {costs.of: costs for costs in anatomy.costs if (costs.shot, costs.block) == (shot, block)}
        assert set(found) == set(expected)
        for of, (values, gone) in expected.items():
            costs = found[of]
            assert (costs.count, costs.n_gone) == (values.size, int(gone.sum()))
            assert (costs.minimum, costs.maximum) == pytest.approx((values.min(), values.max()), rel=1e-6)
            assert costs.largest_gone == (pytest.approx(values[gone].max(), rel=1e-6) if gone.any() else None)
            ordered = np.sort(values)
            places = np.array(QUANTILES) * (ordered.size - 1)
            between = np.interp(places, np.arange(ordered.size), ordered)
            assert list(costs.quantiles) == list(QUANTILES)
            assert list(costs.quantiles.values()) == pytest.approx(between, rel=1e-5)
            if costs.threshold is not None and of != "neurons":
                assert (values[gone] <= costs.threshold * (1 + 1e-6)).all()
                assert (values[~gone] >= costs.threshold * (1 - 1e-6)).all()
        in_manifest = block_costs(store, pruned.manifest, shot, block)
        assert in_manifest is not None
        assert sum(sample.values.size for sample in in_manifest) == sum(v.size for v, _ in expected.values())


def candidates(
    store: Store,
    pruned: Pruned,
    shot: int,
    block: int,
    was: dict[tuple[int, str], PrunedLinear],
    now: dict[tuple[int, str], PrunedLinear],
) -> Candidates:
    """What stood for election in a block, from its costs and from its weights before and after."""
    costs = store.open(pruned.manifest[f"shot-{shot:02d}/block-{block:02d}/costs"].key)
    names = [name for b, name in was if b == block]
    pairs = [(was[block, name], now[block, name]) for name in names]
    structure = str(pruned.session.recipe.granularity)
    if structure == "units":
        n_gone = [
            int(was[block, name].live_columns.sum() - now[block, name].live_columns.sum()) // width
            for name, width in (("mlp.dense_4h_to_h", 1), ("attention.dense", 8))
        ]
        values = [costs.array(f"{kind}/costs") for kind in ("mlp", "attention")]
        return {
            of: (v, np.arange(v.size) < n)
            for of, v, n in zip(("neurons", "key/value groups"), values, n_gone, strict=True)
        }
    if structure in ("rows", "columns", "rows-and-columns"):
        found: Candidates = {}
        for side, other, part in (("rows", "columns", "row_costs"), ("columns", "rows", "column_costs")):
            if side not in structure:
                continue
            lived = [getattr(old, f"live_{side}").numpy() for old, _ in pairs]
            lives = [getattr(new, f"live_{side}").numpy() for _, new in pairs]
            n_freed = [int(getattr(old, f"live_{other}").sum()) for old, _ in pairs]
            ends = np.cumsum([len(live) for live in lived])[:-1]
            split = np.split(costs.array(part), ends)
            # A linear without columns has no rows to free anything, and the other way round.
            each = [parts for parts in zip(split, lived, lives, n_freed, strict=True) if parts[3]]
            found[side] = (
                np.concatenate([values[live] / n for values, live, _, n in each]),
                np.concatenate([~stays[live] for _, live, stays, _ in each]),
            )
        return found
    values, gone = [], []
    n, m = map(int, structure.split(":")) if ":" in structure else (1, 1)
    for name, (old, new) in zip(names, pairs, strict=True):
        all_costs = costs.array(f"{name}/costs")
        grouped = np.sort(all_costs.reshape(len(all_costs), -1, m), axis=2)
        went = ((old.weight != 0) & (new.weight == 0)).numpy().reshape(len(all_costs), -1, m).any(axis=2)
        live = (grouped == -1).sum(axis=2) < n
        values.append(grouped[:, :, :n].clip(min=0).sum(axis=2)[live])
        gone.append(went[live])
    return {"weights" if m == 1 else f"groups of {m} weights": (np.concatenate(values), np.concatenate(gone))}


DAMPED = [
    ({"structure": "rows-and-columns"}, (0.01, 0.1), 0),
    ({"structure": "rows-and-columns", "damping": {"activations": 0.5, "gradients": 0.25}}, (0.5, 0.25), 0),
    ({"structure": "weights", "method": "wanda"}, (0.0, None), None),
    ({"structure": "rows", "method": "magnitude"}, (None, None), None),
    ({"structure": "weights", "method": "sparsegpt"}, (0.01, None), None),
]


@pytest.mark.parametrize(("settings", "expected", "escalations"), DAMPED)
def test_damping(
    runs: Runs, settings: dict[str, Any], expected: tuple[float | None, float | None], escalations: int | None
) -> None:
    pruned = two_shots(runs, settings)
    anatomy = read_anatomy(runs.store, pruned.manifest, 2)
    assert len(anatomy.dampings) == len(anatomy.linears)
    assert {(d.activations, d.gradients) for d in anatomy.dampings} == {expected}
    assert {d.escalations for d in anatomy.dampings} == {escalations}


def test_damping_of_units_is_that_of_what_pays(runs: Runs) -> None:
    anatomy = read_anatomy(runs.store, two_shots(runs, {"structure": "units"}).manifest, 2)
    paying = {d.linear: (d.activations, d.gradients) for d in anatomy.dampings if d.activations is not None}
    assert paying == {"attention.dense": (0.1, 0.0), "mlp.dense_4h_to_h": (0.1, 0.0)}


def test_what_was_dropped_is_said(fresh: Runs) -> None:
    pruned = fresh.prune(structure="weights", shots=2, sparsity=0.3, run={"keep": "last"})
    anatomy = read_anatomy(fresh.store, pruned.manifest, 2)
    assert {costs.shot for costs in anatomy.costs} == {2}
    assert anatomy.missing == ["costs of shot-01, 2 of 2 blocks: dropped by run.keep, or the run was changed"]
    assert block_costs(fresh.store, pruned.manifest, 1, 0) is None
    assert [mask.shot for mask in anatomy.masks] == [1, 2]
    fresh.store.evict(pruned.manifest["shot-02/block-01/update"].key)
    anatomy = read_anatomy(fresh.store, pruned.manifest, 2)
    assert {facts.live_rows is None for facts in anatomy.linears if facts.block == 1} == {True}
    assert {facts.live_rows is None for facts in anatomy.linears if facts.block == 0} == {False}
    assert anatomy.missing[0] == "live rows and columns of shot-02/block-01: its weights are not in the store"
    with pytest.raises(InputError, match="there is no record of shot-03 among the"):
        read_anatomy(fresh.store, pruned.manifest, 3)


FACTORS = [
    {"structure": "rows-and-columns"},
    {"structure": "weights"},
    {"structure": "units"},
    slow({"structure": "columns", "curvature": "nearest-kronecker"}),
    slow({"structure": "rows-and-columns", "curvature": "activations"}),
]


@pytest.mark.parametrize("settings", FACTORS)
def test_spectra_are_those_of_what_was_inverted(runs: Runs, settings: dict[str, Any]) -> None:
    pruned = two_shots(runs, settings)
    recipe, context, references = pruned.session.recipe, pruned.session.context, pruned.manifest
    was = before(pruned, 2)
    dampings = {(d.block, d.linear): d for d in read_anatomy(runs.store, references, 2).dampings}
    work = spectrum_work(references, 2, 1, pruned.session.model.blocks[1])
    assert work is not None
    outcome = spectrum_task(StorePlace(runs.store.root), work)
    found = read_spectra(runs.store, outcome.value)
    assert spectrum_task(StorePlace(runs.store.root), work).cached
    statistics = {s: references[name] for s in Statistic if (name := f"shot-02/block-01/{s}") in references}
    measured = pruned.session.measured_linears or [name for block, name in was if block == 1]
    assert list(found) == sorted(measured)
    for name, factors in read_statistics(context, statistics, measured):
        live = live_linear(was[1, name], factors, recipe.curvature.kind, recipe.damping, name)
        curvature = live.curvature
        assert isinstance(curvature, KroneckerCurvature)
        sides = {"A": (curvature.activations, dampings[1, name].activations)}
        if curvature.has_gradients:
            sides["G"] = (curvature.gradients, dampings[1, name].gradients)
        assert set(found[name]) == set(sides)
        for side, (factorised, damping) in sides.items():
            spectrum = found[name][side]
            plain = np.linalg.eigvalsh(factorised.matrix.double().numpy())
            assert spectrum.values == pytest.approx(plain, rel=1e-9, abs=1e-12 * plain[-1])
            if damping:  # units leave that of gradients without
                damped = np.linalg.eigvalsh(factorised.damped.numpy())
                shifted = spectrum.values + spectrum.added(damping)
                assert shifted == pytest.approx(damped, rel=1e-9, abs=1e-12 * plain[-1])
                assert spectrum.condition(damping) == pytest.approx(damped[-1] / damped[0], rel=1e-6)
            facts = outcome.value.attributes["linears"][name][side]
            assert facts["condition"] == pytest.approx(max(plain[-1] / max(plain[0], plain[-1] * 2.0**-23), 1))
            p = plain.clip(min=0) / plain.clip(min=0).sum()
            entropy = -sum(x * np.log(x) for x in p if x > 0)
            assert np.log(facts["effective_rank"]) == pytest.approx(entropy, abs=1e-9)


def test_a_condition_number_beyond_float32_is_that_of_its_rounding() -> None:
    assert Spectrum(np.array([-1e-20, 1.0, 4.0])).condition() == 2.0**23
    assert Spectrum(np.array([1e-3, 1.0, 4.0])).condition() == pytest.approx(4000)
    assert Spectrum(np.array([0.0, 2.0, 4.0])).condition(0.5) == pytest.approx(5.0)
    assert Spectrum(np.zeros(3)).condition() is None
    assert Spectrum(np.array([])).condition() is None
    assert Spectrum(np.zeros(3)).effective_rank() == 0.0
    assert Spectrum(np.ones(5)).effective_rank() == pytest.approx(5.0)
    assert Spectrum(np.array([0.0, 0.0, 7.0])).effective_rank() == pytest.approx(1.0)


def test_spectra_outlive_the_factors(fresh: Runs) -> None:
    pruned = fresh.prune(shots=1, sparsity=0.3)
    works = [spectrum_work(pruned.manifest, 1, b, pruned.session.model.blocks[b]) for b in (0, 1)]
    assert works[0] is not None
    assert works[1] is not None
    first = spectrum_task(StorePlace(fresh.store.root), works[0])
    assert not first.cached
    for block in (0, 1):
        fresh.store.evict(pruned.manifest[f"shot-01/block-{block:02d}/input-factors"].key)
    assert [can_be_had(fresh.store, work) for work in works if work] == [True, False]
    again = spectrum_task(StorePlace(fresh.store.root), works[0])
    assert again.cached
    assert again.value == first.value
    with pytest.raises(EvictedError, match="input-factors"):
        spectrum_task(StorePlace(fresh.store.root), works[1])


def test_what_has_no_factors_has_no_spectra(runs: Runs) -> None:
    for settings in ({"structure": "rows", "method": "magnitude"}, {"structure": "rows", "curvature": "diagonal"}):
        pruned = two_shots(runs, settings)
        assert spectrum_work(pruned.manifest, 2, 0, pruned.session.model.blocks[0]) is None
