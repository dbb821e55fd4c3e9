"""`surgeon inspect`: the run, a block, the store; as tables, JSON and plots, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from flows.engine import InlineEngine
from flows.inspection.block import BlockView, inspect_block
from flows.inspection.objects import bytes_by_kind, list_objects
from flows.inspection.opening import choose_shot, read_manifest
from flows.inspection.plots import draw_block, draw_objects, draw_run, save
from flows.inspection.run import inspect_run
from flows.workspace import Workspace, write_json
from surgeon.errors import InputError
from surgeon.store import Store
from tests.flows.project import ROOT, Project, slow
from tests.flows.sessions import Runs, small_inputs

pytestmark = pytest.mark.usefixtures("in_process")

PAGE = (ROOT / "docs" / "inspecting.md").read_text()


def workspace(project: Project) -> Workspace:
    return Workspace(project.root)


def look(project: Project, block: int, linear: str | None = None, shot: int | None = None) -> BlockView:
    return inspect_block(workspace(project), InlineEngine(), block, linear, shot)


def test_the_run_is_put_together(again: Project) -> None:
    run = json.loads(again.surgeon("inspect", "--json").ok().stdout)
    results = again.results()
    assert run["shot"] == 3
    for shot in results["shots"]:
        totals = run["shots"][str(shot["shot"])]
        assert totals["sparsity"] == pytest.approx(shot["sparsity"], abs=1e-12)
        assert totals["predicted_cost"] == pytest.approx(shot["predicted_cost"], rel=1e-9)
    linears = run["anatomy"]["linears"]
    last = run["shots"]["3"]
    assert last["n_weights"] == results["dense"]["linear_weights"]
    for parts, key in ((run["kinds"], "linear"), (run["blocks"], "block")):
        assert sum(part["n_live"] for part in parts.values()) == last["n_live"]
        for name, part in parts.items():
            mine = [facts for facts in linears if str(facts[key]) == name]
            n_weights = sum(facts["n_out"] * facts["n_in"] for facts in mine)
            assert part["sparsity"] == pytest.approx(1 - sum(f["n_live"] for f in mine) / n_weights)
            sizes = [facts["update_size"] for facts in mine]
            assert part["update_size"] == [min(sizes), max(sizes)]
    assert [mask["threshold"] for mask in run["anatomy"]["masks"]] == [s["threshold"] for s in results["shots"]]
    first = json.loads(again.surgeon("inspect", "--json", "--shot", "1").ok().stdout)
    assert first["shots"] == {"1": run["shots"]["1"]}
    assert sum(facts["n_live"] for facts in first["anatomy"]["linears"]) == first["shots"]["1"]["n_live"]


def test_tables(again: Project) -> None:
    done = again.surgeon("inspect").ok()
    assert done.stderr == ""
    results = again.results()
    for text in (
        "linears of all blocks after shot 3",
        "mlp.down_proj",
        "0.01, 0.1",
        f"{results['shots'][2]['sparsity']:.2%}",
    ):
        assert text in done.stdout
    done = again.surgeon("inspect", "--block", "1", "--plot", "block.png").ok()
    view = look(again, 1)
    factor = view.linears[0].factors["A"].spectrum
    for text in (
        "block 1 after shot 3",
        f"{factor.condition():.3g}",
        f"{factor.effective_rank():.1f}",
        "plot: block.png",
    ):
        assert text in done.stdout
    assert imread(again.root / "block.png").shape[0] > 500


def test_a_block_from_its_factors_and_weights(again: Project) -> None:
    view = look(again, 2, shot=1)
    value = view.to_json()
    run = zarr.open_group(again.data / "run.zarr", mode="r")
    shot = run["shot-01/block-02"]
    assert isinstance(shot, zarr.Group)
    reads = dict(shot["input-factors"].attrs)["reference"]["attributes"]["reads"]
    assert len(value["linears"]) == 7
    for linear in value["linears"]:
        name = linear["linear"]
        weight = np.asarray(shot[f"update/{name}/weight"][...])  # type: ignore[index]
        assert linear["live_rows"] == int(weight.any(axis=1).sum())
        assert linear["live_columns"] == int(weight.any(axis=0).sum())
        assert linear["damping"] == {"activations": 0.01, "gradients": 0.1}
        assert linear["escalations"] == 0
        for side, place, ratio in (
            ("A", f"input-factors/{reads[name]}/A", 0.01),
            ("G", f"output-factors/{name}/G", 0.1),
        ):
            array = shot[place]
            n = int(array.attrs["n"])  # type: ignore[arg-type]
            matrix = np.zeros((n, n))
            matrix[np.tril_indices(n)] = array[...]  # type: ignore[index]
            values = np.linalg.eigvalsh(matrix)
            factor = linear["factors"][side]
            assert factor["eigenvalues"] == pytest.approx(values, rel=1e-6, abs=1e-10 * values[-1])
            added = ratio * np.trace(matrix) / n
            assert factor["damping_added"] == pytest.approx(added, rel=1e-9)
            assert factor["condition"] == pytest.approx(values[-1] / max(values[0], values[-1] * 2.0**-23), rel=1e-4)
            assert factor["condition_damped"] == pytest.approx((values[-1] + added) / (values[0] + added), rel=1e-6)
            shares = values.clip(0) / values.clip(0).sum()
            rank = np.exp(-sum(share * np.log(share) for share in shares if share > 0))
            assert factor["effective_rank"] == pytest.approx(rank, rel=1e-6)
    check_block_costs(value, shot, run)
    assert look(again, 2, "down_proj", 1).to_json()["linears"] == [value["linears"][-1]]
    assert look(again, 2, "mlp.down_proj", 1).to_json()["linears"] == [value["linears"][-1]]


def check_block_costs(value: dict[str, Any], shot: Any, run: Any) -> None:
    """What was compared is cost per weight freed, and nothing below the threshold stayed."""
    threshold = dict(run["shot-01/mask"].attrs)["reference"]["attributes"]["threshold"]
    row_costs, at = np.asarray(shot["costs/row_costs"][...]), 0
    for linear in value["linears"]:
        costs = {one["of"]: one for one in linear["costs"]}
        assert set(costs) == {"rows", "columns"}
        expected = row_costs[at : at + linear["n_out"]] / linear["n_in"]
        assert costs["rows"]["values"] == pytest.approx(expected, rel=1e-12)
        assert costs["rows"]["unit"] == "cost per weight"
        assert costs["rows"]["n_gone"] == linear["n_out"] - linear["live_rows"]
        for one in costs.values():
            assert one["threshold"] == threshold
            assert [v <= threshold for v in one["values"]] == one["gone"]
        at += linear["n_out"]


def test_eigenvalues_are_computed_once_and_outlive_the_factors(again: Project) -> None:
    store = Store(again.data / "store")
    for reference in list(store.entries()):
        if reference.kind == "spectra":
            store.evict(reference.key)
    engine = InlineEngine()
    first = inspect_block(workspace(again), engine, 0, None, None)
    assert (engine.tally.executed, engine.tally.cached) == (1, 0)
    inspect_block(workspace(again), engine, 0, None, None)
    assert (engine.tally.executed, engine.tally.cached) == (1, 1)
    references = read_manifest(workspace(again))
    for block in (0, 1):
        store.evict(references[f"shot-03/block-{block:02d}/output-factors"].key)
    assert look(again, 0).to_json() == first.to_json()
    assert look(again, 1).shot == 2  # the last one that can be had
    with pytest.raises(InputError, match=r"the factors of block 1 of shot 3 were dropped .*choose another --shot"):
        look(again, 1, shot=3)
    for shot in (1, 2, 3):
        store.evict(references[f"shot-{shot:02d}/block-02/input-factors"].key)
    with pytest.raises(InputError, match="the factors of block 2 of any shot were dropped"):
        look(again, 2)
    assert read_manifest(workspace(again)).keys() == references.keys()


def test_objects_of_the_run_and_of_the_store(again: Project) -> None:
    rows = json.loads(again.surgeon("inspect", "--objects", "--json").ok().stdout)
    manifest = again.read("manifest.json")
    assert {row["name"]: row["key"] for row in rows} == {name: ref["key"] for name, ref in manifest.items()}
    row = next(row for row in rows if row["name"] == "shot-01/block-00/input-factors")
    assert row["payload"]
    assert row["bytes"] > 10_000
    again.surgeon("prune", "--quiet", "-S", "run.keep=none", "-S", "prune.damping=0.05").ok()
    everything = json.loads(again.surgeon("inspect", "--store", "--json").ok().stdout)
    assert {row["key"] for row in everything} == set(again.labels())
    assert len({row["name"] for row in everything}) < len(everything)  # of two runs some have the same label
    rows = json.loads(again.surgeon("inspect", "--objects", "--json").ok().stdout)
    dropped = {row["name"].rpartition("/")[2] for row in rows if not row["payload"]}
    assert dropped == {"input-factors", "output-factors"}
    kinds = bytes_by_kind(everything)
    sizes = {path: path.stat().st_size for path in again.objects.rglob("*") if path.is_file()}
    assert sum(size for _, size in kinds.values()) == sum(sizes.values())
    assert sum(count for count, _ in kinds.values()) == len(again.labels())
    assert list(kinds.values()) == sorted(kinds.values(), key=lambda kind: -kind[1])


REFUSED = {
    "--block 3": r"--block: got 3, but the model has blocks 0 to 2",
    "--block 1 --linear down": r"--linear: block 1 has no linear 'down'; .*It has self_attn\.q_proj, .*mlp\.down_proj",
    "--block 1 --linear mlp.donw_proj": r"did you mean mlp\.down_proj\?",
    "--block 1 --shot 4": r"--shot: got 4, but the last run has shots 1 to 3",
    "--shot 9": r"--shot: got 9, but the last run has shots 1 to 3",
    "--linear down_proj": r"--linear needs --block",
    "--store --objects": r"--objects and --store exclude each other",
    "--store --block 1": r"--block has no effect with --store",
    "--objects --shot 1": r"--shot has no effect with --objects",
    "--plot run.jpg": r"--plot: run\.jpg must end in \.png, \.svg or \.pdf",
    "--block 0 --plot none/run.png": r"--plot: the folder none does not exist; make it first",
}


@pytest.mark.parametrize("arguments", [*list(REFUSED)[:2], *map(slow, list(REFUSED)[2:])])
def test_refused(finished: Project, arguments: str) -> None:
    n_objects = len(finished.labels())
    done = finished.surgeon("inspect", *arguments.split())
    assert (done.status, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("surgeon: ")
    done_pattern = REFUSED[arguments]
    with pytest.raises(InputError, match=done_pattern):
        raise InputError(done.stderr)
    assert len(finished.labels()) == n_objects


def test_before_a_run_has_finished(params: dict[str, Any], finished: Project, tmp_path: Path) -> None:
    empty = Project(tmp_path / "empty", params)
    with pytest.raises(InputError, match="no run has finished here yet"):
        inspect_run(workspace(empty), None)
    with pytest.raises(InputError, match=r"there is no store at .* yet"):
        list_objects(workspace(empty), whole_store=True)
    copy = finished.copy(tmp_path / "copy")
    (copy.data / "manifest.json").unlink()
    with pytest.raises(InputError, match="inspect --store` shows what an unfinished run has stored"):
        look(copy, 0)
    assert len(list_objects(workspace(copy), whole_store=True)) == len(finished.labels())


def test_results_in_another_store(again: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(again.root / "other")
    monkeypatch.setenv("SURGEON_STORE", str(again.root / "other"))
    with pytest.raises(InputError, match=r"results of the last run are not in the store .*other.*SURGEON_STORE"):
        inspect_run(workspace(again), None)


def test_every_field_is_documented(finished: Project) -> None:
    run = inspect_run(workspace(finished), None).to_json()
    block = look(finished, 0).to_json()
    missing = {name for value in (run, block) for name in fields(value) if f"`{name}`" not in PAGE}
    assert missing == set()


def fields(value: Any) -> set[str]:
    """Names in JSON that are fields, not names of linears or numbers."""
    if isinstance(value, list):
        return set().union(*(fields(item) for item in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    own = {str(name) for name in value if isinstance(name, str) and "." not in name}
    return own.union(*(fields(item) for item in value.values()))


PLOTTED = {
    "rows-and-columns": {"structure": "rows-and-columns"},
    "units": {"structure": "units", "multiple": 4, "widths": "free", "ranking": "cost"},
    "weights": {"structure": "weights"},
    "sparsegpt": {"structure": "weights", "method": "sparsegpt"},
    "magnitude": {"structure": "rows", "method": "magnitude"},
    "2:4": {"structure": "2:4", "method": "wanda"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("plots")
    return Runs(small_inputs(folder), folder / "project")


@pytest.mark.parametrize("name", ["rows-and-columns", "units", *map(slow, list(PLOTTED)[2:])])
def test_plots(runs: Runs, name: str, tmp_path: Path) -> None:
    pruned = runs.prune(**({"sparsity": 0.3, "shots": 2} | PLOTTED[name]))
    here = pruned.session.workspace
    write_json(here.manifest, {n: reference.to_json() for n, reference in pruned.manifest.items()})
    run = inspect_run(here, None)
    figure = draw_run(run)
    kinds = {costs.of for costs in run.anatomy.costs if costs.shot == 2 and costs.n_gone}
    check_figure(figure, tmp_path / "run.png", 1 + len(kinds))
    gone = figure.axes[0].images[0].get_array()
    assert gone is not None
    expected = np.array([facts.sparsity for facts in run.anatomy.linears]).reshape(2, -1).T
    assert np.asarray(gone) == pytest.approx(expected)
    block = inspect_block(here, InlineEngine(), 1, None, None)
    figure = draw_block(block)
    with_factors = [linear for linear in block.linears if linear.factors]
    samples = [*block.units.values(), *(sample for linear in block.linears for sample in linear.costs)]
    kinds = {sample.of for sample in samples}
    n_panels = bool(with_factors) + len(kinds)
    if n_panels:
        check_figure(figure, tmp_path / "block.png", n_panels)
    for panel in figure.axes[bool(with_factors) :]:
        drawn = sum(patch.get_height() for container in panel.containers for patch in container)  # type: ignore[union-attr]
        assert drawn == sum(sample.values.size for sample in samples if sample.of in panel.get_ylabel())
    if with_factors:
        line = figure.axes[0].lines[0].get_ydata()
        values = with_factors[0].factors["A"].spectrum.values[::-1]
        assert np.asarray(line) == pytest.approx(values[values > 0])
    figure = draw_objects(list_objects(here, whole_store=True))
    check_figure(figure, tmp_path / "store.png", 1)


def panels(figure: Figure) -> list[Axes]:
    return [panel for panel in figure.axes if panel.get_label() != "<colorbar>" and panel.axison]


def check_figure(figure: Figure, path: Path, n_panels: int) -> None:
    """Labelled axes, and a picture of a sensible size that is not empty."""
    assert len(panels(figure)) == n_panels
    for panel in panels(figure):
        assert panel.get_xlabel()
        assert panel.get_ylabel()
        assert panel.get_title()
    save(figure, path)
    picture = imread(path)
    assert 200 < picture.shape[0] < 3000
    assert 700 < picture.shape[1] < 3000
    assert picture[..., :3].std() > 0.05
    assert path.stat().st_size < 300_000


def test_formats_of_plots(finished: Project, tmp_path: Path) -> None:
    figure = draw_run(inspect_run(workspace(finished), 1))
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        save(figure, tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(start)


def test_the_last_shot_is_the_default(finished: Project) -> None:
    references = read_manifest(workspace(finished))
    assert choose_shot(references, None) == 3
    assert choose_shot(references, 2) == 2
