from typing import Any

import pytest

from surgeon.choices import (
    Allocation,
    Correction,
    Cost,
    Curvature,
    Method,
    Ranking,
    Structure,
    Targets,
    UpdateRule,
    Widths,
)
from surgeon.errors import ParameterError
from surgeon.presets import WITHOUT_CURVATURE
from surgeon.pruning.granularity import NMPattern
from surgeon.recipe import (
    MAX_ITERATIONS,
    TOLERANCE,
    WEIGHTS_DAMPING,
    Damping,
    Preferences,
    UnitSpec,
    UpdateSpec,
    resolve,
)

BOTH = Structure.ROWS_AND_COLUMNS
WEIGHTS = Structure.WEIGHTS
PATTERN = NMPattern(2, 4)
SINGLE = (Curvature.ACTIVATIONS, Curvature.KFAC, Curvature.NEAREST_KRONECKER)
SUMS = (Curvature.KRONECKER_SUM, Curvature.EKFAC)
UNCORRELATED = (Curvature.IDENTITY, Curvature.DIAGONAL)


def refused(message: str, **preferences: Any) -> None:
    with pytest.raises(ParameterError, match=message):
        resolve(Preferences(**preferences))


@pytest.mark.parametrize(
    ("method", "curvature", "cost", "update", "allocation"),
    [
        ("magnitude", "identity", "obd", "none", "global"),
        ("l-obd", "activations", "obd", "none", "global"),
        ("k-obd", "kfac", "obd", "none", "global"),
        ("llm-surgeon", "kfac", "obs", "exact", "global"),
        ("wanda", "activations", "obd", "none", "per-row"),
        ("sparsegpt", "activations", "obs", "sequential", "per-layer"),
    ],
)
@pytest.mark.parametrize("granularity", [WEIGHTS, PATTERN], ids=str)
def test_presets(
    method: str, curvature: str, cost: str, update: str, allocation: str, granularity: Structure | NMPattern
) -> None:
    recipe = resolve(Preferences(method=Method(method), granularity=granularity))
    assert (recipe.method, recipe.granularity) == (Method(method), granularity)
    assert (recipe.curvature.kind, recipe.cost, recipe.update.rule) == (curvature, cost, update)
    assert (recipe.allocation, recipe.ranking, recipe.correction) == (allocation, Ranking.COST, Correction.NONE)
    given = Preferences(
        method=Method(method),
        granularity=granularity,
        curvature=Curvature(curvature),
        cost=Cost(cost),
        update=UpdateRule(update),
        allocation=Allocation(allocation),
    )
    assert resolve(given) == recipe


@pytest.mark.parametrize("method", ["magnitude", "l-obd", "k-obd", "wanda", "sparsegpt"])
def test_fixed_by_the_method(method: str) -> None:
    own = resolve(Preferences(method=Method(method), granularity=WEIGHTS))
    for name, value, other in (
        ("curvature", own.curvature.kind, Curvature.EKFAC),
        ("cost", own.cost, Cost.OBS if own.cost is Cost.OBD else Cost.OBD),
        ("update", own.update.rule, UpdateRule.EXACT),
    ):
        message = f"{name}: got {other}, but method {method} is defined with {name}: {value}; .*llm-surgeon"
        refused(message, method=Method(method), granularity=WEIGHTS, **{name: other})


@pytest.mark.parametrize("method", [Method.WANDA, Method.SPARSEGPT])
@pytest.mark.parametrize("structure", [Structure.ROWS, Structure.COLUMNS, Structure.ROWS_AND_COLUMNS])
def test_methods_of_weights_only(method: Method, structure: Structure) -> None:
    refused(
        f"structure: got {structure}, but method {method} removes single weights", method=method, granularity=structure
    )


class TestCurvature:
    def test_terms_of_a_kronecker_sum(self) -> None:
        spec = resolve(Preferences(curvature=Curvature.KRONECKER_SUM)).curvature
        assert (spec.rank, spec.iterations) == (2, 2)
        spec = resolve(Preferences(curvature=Curvature.KRONECKER_SUM, rank=3, power_iterations=5)).curvature
        assert (spec.rank, spec.iterations) == (3, 5)

    def test_nearest(self) -> None:
        spec = resolve(Preferences(curvature=Curvature.NEAREST_KRONECKER)).curvature
        assert (spec.rank, spec.iterations) == (1, 2)

    @pytest.mark.parametrize("kind", [kind for kind in Curvature if kind is not Curvature.KRONECKER_SUM])
    def test_rank_of_others(self, kind: Curvature) -> None:
        refused(f"rank: 2 has no effect with curvature: {kind} .only kronecker-sum has", curvature=kind, rank=2)

    @pytest.mark.parametrize("kind", [*UNCORRELATED, Curvature.ACTIVATIONS, Curvature.KFAC, Curvature.EKFAC])
    def test_iterations_of_others(self, kind: Curvature) -> None:
        refused(f"power_iterations: 2 has no effect with curvature: {kind}", curvature=kind, power_iterations=2)

    def test_draws(self) -> None:
        spec = resolve(Preferences(targets=Targets.SAMPLED), seed=7).curvature
        assert (spec.targets, spec.draws, spec.seed) == (Targets.SAMPLED, 1, 7)
        assert resolve(Preferences(targets=Targets.SAMPLED, draws=4)).curvature.draws == 4
        assert resolve(Preferences(), seed=7).curvature.seed == 0
        refused("draws: 1 has no effect with targets: empirical", draws=1)
        refused("draws: 2 has no effect with targets: empirical", draws=2, targets=Targets.EMPIRICAL)

    @pytest.mark.parametrize("kind", [Curvature.IDENTITY, Curvature.ACTIVATIONS])
    def test_draws_without_gradients(self, kind: Curvature) -> None:
        refused(f"targets: sampled has no effect with curvature: {kind}", curvature=kind, targets=Targets.SAMPLED)


class TestUpdate:
    @pytest.mark.parametrize("kind", [*SINGLE, *SUMS])
    @pytest.mark.parametrize("granularity", [*(s for s in Structure if s is not Structure.BLOCKS), PATTERN], ids=str)
    def test_exact_iterates_where_it_must(self, kind: Curvature, granularity: Any) -> None:
        iterates = granularity in (WEIGHTS, PATTERN) or kind in SUMS
        update = resolve(Preferences(granularity=granularity, curvature=kind)).update
        assert update == UpdateSpec(UpdateRule.EXACT, *((MAX_ITERATIONS, TOLERANCE) if iterates else (0, 0.0)))
        for name, value in (("max_iterations", 5), ("tolerance", 0.1)):
            given: dict[str, Any] = {"granularity": granularity, "curvature": kind, name: value}
            if iterates:
                assert getattr(resolve(Preferences(**given)).update, name) == value
            else:
                refused(f"{name}: {value} has no effect with update: exact, curvature: {kind}", **given)

    @pytest.mark.parametrize("rule", [UpdateRule.NONE, UpdateRule.CHUNKED])
    def test_others_do_not_iterate(self, rule: UpdateRule) -> None:
        message = f"max_iterations: 5 has no effect with update: {rule}"
        refused(message, granularity=WEIGHTS, update=rule, max_iterations=5)

    @pytest.mark.parametrize("kind", SINGLE)
    def test_chunked(self, kind: Curvature) -> None:
        given: dict[str, Any] = {"granularity": PATTERN, "curvature": kind, "update": UpdateRule.CHUNKED}
        assert resolve(Preferences(**given)).update == UpdateSpec(UpdateRule.CHUNKED, max_correlate=2000)
        assert resolve(Preferences(**given, max_correlate=9)).update.max_correlate == 9

    @pytest.mark.parametrize("kind", SUMS)
    def test_one_product_only(self, kind: Curvature) -> None:
        message = f"needs a curvature that is one Kronecker product .*got curvature: {kind}"
        refused(message, granularity=WEIGHTS, curvature=kind, update=UpdateRule.CHUNKED)
        refused(message, granularity=BOTH, curvature=kind, update=UpdateRule.INDEPENDENT)

    def test_granularity_of_published_updates(self) -> None:
        refused("chunked .* needs structure: weights or N:M; got structure: units", update=UpdateRule.CHUNKED)
        refused("chunked .* got structure: rows", granularity=BOTH, update=UpdateRule.CHUNKED)
        for granularity in (WEIGHTS, PATTERN):
            message = f"independent .* got structure: {granularity}"
            refused(message, granularity=granularity, update=UpdateRule.INDEPENDENT)
        given = Preferences(granularity=BOTH, update=UpdateRule.INDEPENDENT)
        assert resolve(given).update == UpdateSpec(UpdateRule.INDEPENDENT)
        refused("independent .* paid for by its columns alone", update=UpdateRule.INDEPENDENT)

    def test_sequential(self) -> None:
        given: dict[str, Any] = {"granularity": WEIGHTS, "method": Method.SPARSEGPT}
        assert resolve(Preferences(**given)).update == UpdateSpec(UpdateRule.SEQUENTIAL, max_correlate=128)
        assert resolve(Preferences(**given, max_correlate=4)).update.max_correlate == 4
        message = "update: sequential belongs to method: sparsegpt; got method: llm-surgeon"
        refused(message, granularity=WEIGHTS, update=UpdateRule.SEQUENTIAL)

    @pytest.mark.parametrize("rule", [UpdateRule.EXACT, UpdateRule.INDEPENDENT, UpdateRule.NONE])
    def test_width_of_others(self, rule: UpdateRule) -> None:
        refused(f"max_correlate: 5 has no effect with update: {rule}", granularity=BOTH, update=rule, max_correlate=5)

    @pytest.mark.parametrize("kind", UNCORRELATED)
    @pytest.mark.parametrize("granularity", [Structure.ROWS, WEIGHTS, PATTERN], ids=str)
    def test_nothing_is_correlated(self, kind: Curvature, granularity: Any) -> None:
        recipe = resolve(Preferences(granularity=granularity, curvature=kind))
        assert (recipe.update, recipe.cost, recipe.damping) == (UpdateSpec(UpdateRule.NONE), Cost.OBD, Damping(0, 0))
        message = f"update: got exact, but with curvature: {kind} no weight is correlated.*allowed: none"
        refused(message, granularity=granularity, curvature=kind, update=UpdateRule.EXACT)


class TestDamping:
    def test_defaults(self) -> None:
        assert resolve(Preferences(granularity=BOTH)).damping == Damping(0.01, 0.1)
        assert resolve(Preferences(granularity=WEIGHTS)).damping == WEIGHTS_DAMPING
        assert resolve(Preferences(granularity=BOTH, damping_gradients=0.0)).damping == Damping(0.01, 0.0)
        assert resolve(Preferences(granularity=BOTH, damping_activations=0.0)).damping == Damping(0.0, 0.1)

    def test_of_units(self) -> None:
        """Only the factor of activations is inverted, but for a Newton step or a sum of products."""
        assert resolve(Preferences()).damping == Damping(0.1, 0.0)
        refused("damping.gradients: 0.1 has no effect with structure: units .*columns", damping_gradients=0.1)
        for given in ({"correction": Correction.NEWTON}, {"curvature": Curvature.EKFAC}):
            assert resolve(Preferences(**given)).damping == Damping(0.1, 0.1)  # type: ignore[arg-type]

    def test_without_gradients(self) -> None:
        given: dict[str, Any] = {"granularity": WEIGHTS, "method": Method.SPARSEGPT}
        assert resolve(Preferences(**given, damping_activations=0.5)).damping == Damping(0.5, 0.0)
        refused("damping.gradients: 0.5 has no effect with curvature: activations", **given, damping_gradients=0.5)

    @pytest.mark.parametrize("method", [Method.MAGNITUDE, Method.L_OBD, Method.K_OBD, Method.WANDA])
    @pytest.mark.parametrize("name", ["activations", "gradients"])
    def test_where_nothing_is_inverted(self, method: Method, name: str) -> None:
        assert resolve(Preferences(method=method, granularity=WEIGHTS)).damping == Damping(0.0, 0.0)
        message = rf"damping.{name}: 0.1 has no effect with .*\(nothing is inverted or solved there\)"
        refused(message, method=method, granularity=WEIGHTS, **{f"damping_{name}": 0.1})

    @pytest.mark.parametrize("kind", UNCORRELATED)
    def test_where_nothing_is_correlated(self, kind: Curvature) -> None:
        message = f"damping.activations: 0.1 has no effect with curvature: {kind}"
        refused(message, curvature=kind, damping_activations=0.1)

    def test_one_of_cost_and_update_is_enough(self) -> None:
        for given in ({"cost": Cost.OBD}, {"update": UpdateRule.NONE}):
            preferences = Preferences(granularity=BOTH, damping_gradients=0.3, **given)  # type: ignore[arg-type]
            assert resolve(preferences).damping.gradients == 0.3


class TestRankingAndAllocation:
    @pytest.mark.parametrize("granularity", [WEIGHTS, PATTERN], ids=str)
    def test_weights_are_equally_long(self, granularity: Any) -> None:
        assert resolve(Preferences(granularity=granularity, ranking=Ranking.COST)).ranking is Ranking.COST
        message = f"ranking: cost-per-weight has no effect with structure: {granularity}"
        refused(message, granularity=granularity, ranking=Ranking.COST_PER_WEIGHT)

    @pytest.mark.parametrize("ranking", Ranking)
    def test_structures(self, ranking: Ranking) -> None:
        assert resolve(Preferences(granularity=BOTH, ranking=ranking)).ranking is ranking
        assert resolve(Preferences()).ranking is Ranking.COST_PER_WEIGHT

    def test_units_of_equal_widths_have_neither(self) -> None:
        for given in ({"ranking": Ranking.COST}, {"allocation": Allocation.PER_LAYER}):
            (name,) = given
            refused(f"{name}: .* has no effect with widths: uniform", **given)
            assert resolve(Preferences(widths=Widths.FREE, **given))  # type: ignore[arg-type]

    @pytest.mark.parametrize("structure", [Structure.ROWS, Structure.COLUMNS, Structure.ROWS_AND_COLUMNS])
    def test_rows_of_structures(self, structure: Structure) -> None:
        message = f"allocation: per-row .* structure: {structure} .*allowed: global, per-layer"
        refused(message, granularity=structure, allocation=Allocation.PER_ROW)
        given = Preferences(granularity=structure, allocation=Allocation.PER_LAYER)
        assert resolve(given).allocation is Allocation.PER_LAYER

    @pytest.mark.parametrize("method", [Method.MAGNITUDE, Method.LLM_SURGEON, Method.WANDA])
    @pytest.mark.parametrize("granularity", [WEIGHTS, PATTERN], ids=str)
    @pytest.mark.parametrize("allocation", Allocation)
    def test_free_for_weights(self, method: Method, granularity: Any, allocation: Allocation) -> None:
        given = Preferences(method=method, granularity=granularity, allocation=allocation)
        assert resolve(given).allocation is allocation

    @pytest.mark.parametrize("allocation", [Allocation.GLOBAL, Allocation.PER_ROW])
    def test_sparsegpt(self, allocation: Allocation) -> None:
        message = f"allocation: got {allocation}, but method sparsegpt .*allowed: per-layer"
        refused(message, method=Method.SPARSEGPT, granularity=WEIGHTS, allocation=allocation)


class TestUnits:
    @pytest.mark.parametrize(("widths", "multiple"), [(None, 64), (Widths.UNIFORM, 64), (Widths.FREE, 8)])
    def test_defaults(self, widths: Widths | None, multiple: int) -> None:
        assert resolve(Preferences(widths=widths)).units == UnitSpec(
            widths or Widths.UNIFORM, multiple, widths is Widths.FREE, 32
        )
        given = Preferences(widths=widths, multiple=8, heads=True, rescorings=0)
        assert resolve(given).units == UnitSpec(widths or Widths.UNIFORM, 8, True, 0)

    def test_costs_that_are_not_taken_again(self) -> None:
        for given in ({"curvature": Curvature.EKFAC}, {"method": Method.K_OBD}):
            units = resolve(Preferences(**given)).units  # type: ignore[arg-type]
            assert units is not None and units.rescorings == 0
            refused("rescorings: 5 has no effect with cost: ", rescorings=5, **given)

    @pytest.mark.parametrize("granularity", [BOTH, WEIGHTS, PATTERN], ids=str)
    def test_of_others(self, granularity: Any) -> None:
        assert resolve(Preferences(granularity=granularity)).units is None
        for given in ({"widths": Widths.FREE}, {"multiple": 8}, {"heads": False}, {"rescorings": 8}):
            (name,) = given
            refused(f"{name}: .* has no effect with structure: {granularity}", granularity=granularity, **given)


class TestCorrection:
    @pytest.mark.parametrize("granularity", [Structure.ROWS, WEIGHTS, PATTERN], ids=str)
    def test_newton(self, granularity: Any) -> None:
        recipe = resolve(Preferences(granularity=granularity, correction=Correction.NEWTON))
        assert (recipe.correction, recipe.update.newton_step) == (Correction.NEWTON, 0.001)
        given = Preferences(granularity=granularity, correction=Correction.NEWTON, newton_step=1.0)
        assert resolve(given).update.newton_step == 1.0

    def test_newton_needs_the_exact_update(self) -> None:
        message = "correction: newton needs update: exact; got update: "
        independent = UpdateRule.INDEPENDENT
        refused(f"{message}independent", granularity=BOTH, correction=Correction.NEWTON, update=independent)
        refused(f"{message}none", correction=Correction.NEWTON, method=Method.K_OBD)

    @pytest.mark.parametrize("correction", [Correction.NONE, Correction.ADAPTERS])
    def test_step_of_others(self, correction: Correction) -> None:
        refused(f"newton_step: 0.5 has no effect with correction: {correction}", correction=correction, newton_step=0.5)

    def test_adapters_go_with_any_method(self) -> None:
        for method in set(Method) - set(WITHOUT_CURVATURE):
            recipe = resolve(Preferences(method=method, granularity=WEIGHTS, correction=Correction.ADAPTERS))
            assert recipe.correction is Correction.ADAPTERS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rank", 1), ("power_iterations", 0), ("draws", 0), ("max_iterations", 0), ("max_correlate", 0)),
        *(("damping_activations", -0.1), ("damping_gradients", float("nan")), ("damping_gradients", float("inf"))),
        *(("tolerance", 0.0), ("newton_step", 0.0), ("newton_step", 1.1), ("tolerance", float("nan"))),
    ],
)
def test_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ParameterError, match=rf"{name.replace('_', '.')}: got {value}; must be (at least|above)"):
        Preferences(**{name: value})  # type: ignore[arg-type]
