"""A changed parameter makes only that work run again which depends on it."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flows.params import Params
from flows.params_prune import PruneParams
from flows.params_recovery import RecoveryParams
from flows.stages import dense_evaluation
from surgeon.store import Store
from tests.flows.project import ROOT, Project, slow, tasks_of
from tests.flows.sessions import Runs

SHOTS = ("shot-01", "shot-02", "shot-03")
BLOCKS = ("block-00", "block-01", "block-02")


def of_shots(shots: tuple[str, ...], *kinds: str) -> set[str]:
    """Labels of results of shots; kinds of a block are given with a leading `*/`."""
    return {
        f"{shot}/{label}"
        for shot in shots
        for kind in kinds
        for label in ([kind.replace("*", block) for block in BLOCKS] if "*" in kind else [kind])
    }


MAYBE = of_shots(SHOTS[:1], "*/update")
"""Another mask may leave the part of a block as it was, whose update is then reused."""
FROM_COSTS = ("*/costs", "mask", "*/update", "shot", "evaluation")
FACTORS = ("*/input-factors", "*/output-factors")
WHOLE = (*FACTORS, *FROM_COSTS)
SAMPLE = {"pruned/sample"}
SPECTRA = of_shots(SHOTS[2:], "*/spectra")
"""Of the last shot; the report shows them."""
CASES = {
    "report.prompt=Hello": ({"dense/sample", "pruned/sample"}, False),
    "report.new_tokens=2": ({"dense/sample", "pruned/sample"}, False),
    "export.dtype=bfloat16": (set(), True),
    "export.layout=dense": (set(), True),
    "evaluate.windows=3": ({"evaluation/windows", "dense/evaluation", *of_shots(SHOTS, "evaluation")}, True),
    "prune.damping=0.05": (of_shots(SHOTS[:1], *FROM_COSTS) | of_shots(SHOTS[1:], *WHOLE) | SPECTRA | SAMPLE, True),
    "prune.cost=obd": (of_shots(SHOTS[:1], *FROM_COSTS) | of_shots(SHOTS[1:], *WHOLE) | SPECTRA | SAMPLE, True),
    "prune.ranking=cost": (of_shots(SHOTS[:1], *FROM_COSTS[1:]) | of_shots(SHOTS[1:], *WHOLE) | SPECTRA | SAMPLE, True),
    "prune.update=none": (of_shots(SHOTS[:1], *FROM_COSTS[2:]) | of_shots(SHOTS[1:], *WHOLE) | SPECTRA | SAMPLE, True),
    "prune.sparsity=0.1 prune.shots=1": (of_shots(SHOTS[:1], "*/spectra") | SAMPLE, True),
    "prune.sparsity=0.2 prune.shots=2": (of_shots(SHOTS[1:2], "*/spectra") | SAMPLE, True),
    "run.blocks_per_group=1": (set(), False),
    "run.keep=none": (set(), False),
    "calibrate.sequences=5": ({"calibration/sequences", *of_shots(SHOTS, *WHOLE)} | SPECTRA | SAMPLE, True),
    "seed=1": ({"calibration/sequences", *of_shots(SHOTS, *WHOLE)} | SPECTRA | SAMPLE, True),
    "run.batch_size=2": ({"dense/evaluation", *of_shots(SHOTS, *WHOLE)} | SPECTRA | SAMPLE, True),
}


SLOW = ("report.new_tokens=2", "prune.cost=obd", "prune.sparsity=0.2 prune.shots=2", "seed=1", "run.batch_size=2")


@pytest.mark.parametrize("change", [slow(change) if change in SLOW else change for change in CASES])
def test_only_what_depends_on_it(again: Project, change: str) -> None:
    expected, exported = CASES[change]
    before = again.labels()
    overrides = [part for one in change.split() for part in ("-S", one)]
    again.surgeon("run", "--quiet", *overrides).ok()
    new = {label for key, label in again.labels().items() if key not in before}
    changes_the_mask_alone = change in ("prune.cost=obd", "prune.ranking=cost")
    assert expected - (MAYBE if changes_the_mask_alone else set()) <= new <= expected
    # Another perplexity is in the card of the export, not in its weights.
    measured = exported and change != "evaluate.windows=3"
    assert again.results()["tasks"]["executed"] == len(tasks_of(new)) + exported + measured
    assert ("export" in again.executed()) == exported
    assert ("benchmark" in again.executed()) == measured


def test_the_view_shows_the_shot_of_this_run(again: Project) -> None:
    """A shot found under another schedule appears under its number in this one."""
    again.surgeon("run", "--quiet", "-S", "prune.sparsity=0.2", "-S", "prune.shots=2").ok()
    assert {path.name for path in (again.data / "run.zarr").glob("shot-*")} == {"shot-01", "shot-02"}
    assert [shot["target"] for shot in again.results()["shots"]] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("keep", "kept"), [("all", {*SHOTS}), ("last", {"shot-03"}), ("none", set())], ids=["all", "last", "none"]
)
def test_keep_drops_factors_of_shots(again: Project, keep: str, kept: set[str]) -> None:
    again.surgeon("run", "--quiet", "-S", f"run.keep={keep}").ok()
    store = Store(again.data / "store")
    for key, label in again.labels().items():
        is_large = label.endswith("-factors")
        assert store.has_payload(key) == (not is_large or label.split("/")[0] in kept), label
    again.surgeon("run", "--quiet", "-S", f"run.keep={keep}").ok()
    assert again.results()["tasks"]["executed"] == 0


def test_keep_drops_what_groups_hand_over(params: dict[str, Any], finished: Project, tmp_path: Path) -> None:
    """From the start, in groups: hidden states and gradients go as factors do, and nothing has to come back."""
    run = params["run"] | {"keep": "last", "blocks_per_group": 1}
    project = Project(tmp_path / "groups", params | {"run": run})
    project.surgeon("run", "--quiet").ok()
    store = Store(project.data / "store")
    large = {
        key: label for key, label in project.labels().items() if label.rpartition("/")[2] in ("boundary", "gradient")
    }
    assert len(large) == 3 * 4
    for key, label in large.items():
        assert store.has_payload(key) == label.startswith("shot-03"), label
    project.surgeon("run", "--quiet").ok()
    assert project.results()["tasks"]["executed"] == 0
    assert project.results()["weights_digest"] == finished.results()["weights_digest"]


def test_dropped_factors_come_back_with_the_same_bits(again: Project) -> None:
    """Another damping needs the factors of the first shot again; what is below them is not computed again."""
    before = again.contents()
    again.surgeon("run", "--quiet", "-S", "run.keep=none").ok()
    assert len(again.contents()) < len(before)
    again.surgeon("run", "--quiet", "-S", "prune.damping=0.05").ok()
    after = again.contents()
    factors = [
        key for key, label in again.labels().items() if label.startswith("shot-01") and label.endswith("-factors")
    ]
    assert len(factors) == 6
    for path, content in before.items():
        if path.split("/")[1] in factors:
            assert after[path] == content
    assert "curvature" in again.executed()["prune"]


CHOICE = {"mask", "update", "evaluation"}
PRICE = {"costs"} | CHOICE
MEASURED = {"curvature"} | PRICE
BY_MAGNITUDE = {"selector": "magnitude", "protect_first": 0, "protect_last": 0}
BASES: dict[str, dict[str, Any]] = {
    "structures": {},
    "weights": {"structure": "weights", "sparsity": 0.4, "max_iterations": 9},
    "chunked": {"structure": "weights", "sparsity": 0.4, "update": "chunked", "max_correlate": 40},
    "sparsegpt": {"structure": "weights", "sparsity": 0.4, "method": "sparsegpt", "max_correlate": 8},
    "sum": {"curvature": "kronecker-sum"},
    "sampled": {"targets": "sampled"},
    "newton": {"correction": "newton"},
    "units": {"structure": "units", "widths": "free", "sparsity": 0.3},
    "adapters": {"correction": "adapters"},
    "bonsai": {"structure": "units", "method": "bonsai", "widths": "free", "multiple": 1, "bonsai": {"sub_models": 10}},
    "layerchop": {"structure": "units", "method": "layerchop", "sparsity": 0.5, "layerchop": BY_MAGNITUDE},
}
"""What a row of the table starts from."""
TABLE: list[tuple[str, dict[str, Any], set[str]]] = [
    ("structures", {"method": "k-obd"}, PRICE),
    ("structures", {"method": "magnitude"}, PRICE),
    ("weights", {"method": "wanda"}, PRICE),
    ("structures", {"sparsity": 0.3}, CHOICE),
    ("structures", {"shots": 2, "sparsity": 0.4}, set()),
    ("structures", {"structure": "rows"}, CHOICE),
    ("structures", {"structure": "weights"}, PRICE),
    ("weights", {"structure": "2:4"}, CHOICE),
    ("structures", {"curvature": "activations"}, PRICE),
    ("structures", {"curvature": "ekfac"}, {"moments"} | PRICE),
    ("structures", {"curvature": "nearest-kronecker"}, {"kronecker-terms"} | PRICE),
    ("structures", {"curvature": "diagonal"}, MEASURED),
    ("sum", {"rank": 3}, {"kronecker-terms"} | PRICE),
    ("sum", {"power_iterations": 1}, {"kronecker-terms"} | PRICE),
    ("structures", {"targets": "sampled"}, MEASURED),
    ("sampled", {"draws": 2}, MEASURED),
    ("structures", {"cost": "obd"}, PRICE),
    ("structures", {"ranking": "cost"}, CHOICE),
    ("structures", {"allocation": "per-layer"}, CHOICE),
    ("weights", {"allocation": "per-row"}, CHOICE),
    ("structures", {"update": "independent"}, {"update", "evaluation"}),
    ("weights", {"max_iterations": 3}, {"update", "evaluation"}),
    ("weights", {"tolerance": 0.5}, {"update", "evaluation"}),
    ("chunked", {"max_correlate": 10}, {"update", "evaluation"}),
    ("sparsegpt", {"max_correlate": 4}, {"update", "evaluation"}),
    ("structures", {"damping": 0.05}, PRICE),
    ("weights", {"damping": {"gradients": 0.5}}, PRICE),
    ("structures", {"correction": "newton"}, {"curvature", "update", "evaluation"}),
    ("newton", {"newton_step": 0.1}, {"update", "evaluation"}),
    ("structures", {"correction": "adapters"}, {"correction", "evaluation"}),
    ("adapters", {"adapters": {"rank": 2}}, {"correction", "evaluation"}),
    ("structures", {"shots": 2, "sparsity": 0.4, "fresh_calibration": True}, set()),
    ("structures", {"structure": "units", "multiple": 8}, MEASURED),
    ("units", {"widths": "uniform", "multiple": 8}, CHOICE),
    ("units", {"multiple": 16}, CHOICE),
    ("units", {"heads": False}, CHOICE),
    ("units", {"rescorings": 0}, PRICE),
    ("units", {"sparsity": None, "parameters": 11_500}, CHOICE),
    ("units", {"sparsity": None, "size": 47_000}, CHOICE),
    ("units", {"sparsity": None, "speedup": 1.05}, CHOICE),
    ("bonsai", {"bonsai": {"sub_models": 12}}, {"sub-model-0010", "sub-model-0011", "ranking"} | CHOICE),
    ("bonsai", {"bonsai": {"sub_models": 10, "scope": "per-layer"}}, {"ranking"} | CHOICE),
    (
        "layerchop",
        {"layerchop": BY_MAGNITUDE | {"selector": "block-influence"}},
        {"similarity", "selection"},
    ),
    ("layerchop", {"layerchop": BY_MAGNITUDE | {"protect_last": 1}}, {"selection", "evaluation"}),
]
"""Base, change, and the kinds of tasks of the first shot that run again."""


@pytest.fixture(scope="module")
def bases(
    in_process: None, small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Project]:
    """Gives a project after one shot of a base; not to be changed."""

    @cache
    def project(base: str) -> Project:
        done = Project(tmp_path_factory.mktemp(base) / "project", small)
        dense_evaluation(Runs(small, done.root).prune(**{"shots": 1, **BASES[base]}).session)
        return done

    return project


@pytest.mark.parametrize(("base", "change", "expected"), TABLE, ids=[f"{base} {change}" for base, change, _ in TABLE])
def test_kinds_that_run_again(
    bases: Callable[[str], Project], tmp_path: Path, base: str, change: dict[str, Any], expected: set[str]
) -> None:
    runs = Runs(bases(base).params, bases(base).copy(tmp_path / "project").root)
    settings = {"shots": 1, **BASES[base]} | change
    if "method" in change:  # which leaves nothing to iterate
        settings.pop("max_iterations", None)
    assert set(runs.prune(**settings).kinds("shot-01")) == expected


def test_every_parameter_of_prune_is_in_the_table() -> None:
    assert {name for _, change, _ in TABLE for name in change} == set(PruneParams.model_fields)


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in tree.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


TEXTS = {"source", "split", "column", "revision"}
EVERYTHING = {"sequences", "windows", "evaluation"} | MEASURED
CALIBRATION = EVERYTHING - {"windows"}  # and of the evaluations that of the shot alone
OTHERS: list[tuple[str, Any, set[str]]] = [
    ("seed", 1, CALIBRATION),
    ("calibrate.sequences", 5, CALIBRATION),
    ("calibrate.length", 16, CALIBRATION),
    ("calibrate.order", "random-offsets", CALIBRATION),
    ("calibrate.text.split", "first:50%", CALIBRATION),
    ("evaluate.windows", 3, {"windows", "evaluation"}),
    ("evaluate.length", 16, {"windows", "evaluation"}),
    ("evaluate.text.split", "first:50%", {"windows", "evaluation"}),
    ("model.dtype", "bfloat16", EVERYTHING),
    ("run.batch_size", 2, {"evaluation"} | MEASURED),
    ("run.threads", 1, EVERYTHING),
    ("run.shards", 2, MEASURED | {"reduction"}),
    ("run.blocks_per_group", 1, set()),
    ("run.keep", "none", set()),
]
"""Parameters of other sections, and the kinds of tasks that run again for one shot and the dense evaluation."""
ELSEWHERE = {
    **dict.fromkeys(
        ("model.source", "model.revision", "model.trust_remote_code"), "another model, whose digest counts"
    ),
    **dict.fromkeys((f"{s}.text.{n}" for s in ("calibrate", "evaluate") for n in TEXTS), "a text, whose digest counts"),
    **dict.fromkeys(("run.engine", "run.store", "run.cache"), "test_prefect.py, test_survival.py, test_bucket.py"),
    **dict.fromkeys(("run.runner", "run.workers", "run.cluster"), "test_runners.py"),
    **dict.fromkeys(("run.device", "run.memory_gib"), "the kind of device is in every key; memory chooses the groups"),
    "run.precision": "test_batching.py: has an effect on a GPU alone, and is in every key",
    **dict.fromkeys(("export.dtype", "export.layout", "report.prompt", "report.new_tokens"), "CASES"),
    **dict.fromkeys(
        (f"benchmark.{name}" for name in ("batch_sizes", "prompt", "new_tokens", "rounds", "dtype")),
        "test_benchmark.py",
    ),
    **dict.fromkeys(
        (f"recovery.{name}" for name in leaves(RecoveryParams().model_dump(mode="json"))), "test_recovery.py"
    ),
}


@pytest.mark.parametrize(("name", "value", "expected"), OTHERS, ids=[name for name, _, _ in OTHERS])
def test_kinds_that_run_again_in_other_sections(
    bases: Callable[[str], Project], tmp_path: Path, name: str, value: Any, expected: set[str]
) -> None:
    project = bases("structures").copy(tmp_path / "project")
    sections = copy.deepcopy(project.params) | {"prune": {"shots": 1}}
    *path, last = name.split(".")
    section = sections
    for part in path:
        section = section[part]
    section[last] = value
    again = Runs(sections, project.root).prune(shots=1)
    dense_evaluation(again.session)
    assert {kind.rpartition("/")[2] for kind in again.ran} == expected


def test_every_parameter_is_tested_and_in_the_page() -> None:
    """docs/parameters.md says for each what runs again, by its name or as part of its section."""
    page = (ROOT / "docs" / "parameters.md").read_text().partition("## Change this, and these run again")[2]
    for name in leaves(Params().model_dump(mode="json")):
        section = name.partition(".")[0]
        assert name in {n for n, _, _ in OTHERS} or name in ELSEWHERE or section == "prune", name
        shown = {name, ".".join(name.split(".")[:2]), f"{section}.*"}
        assert any(f"`{text}`" in page for text in shown), name
