"""Tables of methods by sparsity: the same numbers as single runs, resumable, and safe from what names hold."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import compare
from flows.compare_files import FIELDS, long_form, markdown, plain
from flows.compare_plot import draw_comparison
from flows.compare_spec import load_spec, plan_runs
from flows.comparison import Cell, Comparison, Row, Table, Usage
from flows.engine import InlineEngine
from flows.session import Session
from flows.workspace import Workspace
from surgeon.errors import NumericalError, ParameterError, SurgeonError
from surgeon.store import Store
from tests.flows.project import Project

FILES = ("comparison.md", "comparison.csv", "comparison.json", "comparison.png")
TIMED = ("statistics_s", "costs_mask_s", "update_s", "peak_memory_gib")
SPEC: dict[str, Any] = {
    "set": ["calibrate.sequences=5"],
    "tables": [
        {
            "title": "Rows and columns",
            "set": ["prune.shots=1"],
            "sparsities": [0.1, 0.2],
            "rows": [
                {"name": "llm-surgeon", "set": ["prune.method=llm-surgeon"]},
                {"name": "k-obd", "set": ["prune.method=k-obd"]},
                {"name": "in shots", "set": ["prune.shots=2"], "from_shots": True},
            ],
        },
        {
            "title": "Rows",
            "set": ["prune.structure=rows"],
            "sparsities": [0.1],
            "rows": [{"name": "other seed", "set": ["prune.shots=1", "seed=3"]}],
        },
    ],
}


def put_spec(project: Project, spec: Any = SPEC) -> Project:
    (project.root / "compare.yaml").write_text(yaml.safe_dump(spec))
    return project


def written(project: Project) -> dict[str, bytes]:
    return {name: (project.data / "compare" / name).read_bytes() for name in FILES}


def lines(project: Project, without: tuple[str, ...] = ()) -> list[dict[str, str]]:
    text = (project.data / "compare" / "comparison.csv").read_text()
    return [{k: v for k, v in line.items() if k not in without} for line in csv.DictReader(io.StringIO(text))]


@pytest.fixture(scope="module")
def compared(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = put_spec(Project(tmp_path_factory.mktemp("compared") / "project", params))
    done = project.surgeon("compare", "compare.yaml").ok()
    assert "1/6 llm-surgeon at 10%" in done.stderr
    assert "5/6 in shots at 10%, 20%" in done.stderr
    assert "llm-surgeon" in done.stdout
    return project


class TestNumbers:
    @pytest.mark.parametrize(
        ("row", "sparsity", "overrides"),
        [
            ("llm-surgeon", "0.2", ["prune.shots=1", "prune.sparsity=0.2"]),
            ("k-obd", "0.1", ["prune.shots=1", "prune.sparsity=0.1", "prune.method=k-obd"]),
            ("in shots", "0.2", ["prune.shots=2", "prune.sparsity=0.2"]),
            ("other seed", "0.1", ["prune.shots=1", "prune.sparsity=0.1", "prune.structure=rows", "seed=3"]),
        ],
    )
    def test_are_those_of_the_run(
        self, compared: Project, tmp_path: Path, row: str, sparsity: str, overrides: list[str]
    ) -> None:
        """In another store: the comparison did not take over anything."""
        single = Project(tmp_path / "single", compared.params)
        given = [part for one in ["calibrate.sequences=5", *overrides] for part in ("-S", one)]
        single.surgeon("run", "--quiet", *given).ok()
        results = single.results()
        line = next(line for line in lines(compared) if (line["row"], line["sparsity"]) == (row, sparsity))
        assert float(line["perplexity"]) == results["pruned"]["perplexity"]
        assert float(line["reached"]) == results["pruned"]["sparsity"]
        assert int(line["shots"]) == len(results["shots"])
        dense = next(line for line in lines(compared) if line["row"] == "dense")
        assert float(dense["perplexity"]) == results["dense"]["perplexity"]

    def test_json_and_csv_agree(self, compared: Project) -> None:
        metrics = compared.read("compare/comparison.json")
        found = {
            (line["table"], line["row"], f"{100 * float(line['sparsity']):g}%"): float(line["perplexity"])
            for line in lines(compared)
        }
        flat = {
            (t, r, s): value for t, rows in metrics.items() for r, cells in rows.items() for s, value in cells.items()
        }
        assert flat == found
        assert len(flat) == 2 + 6 + 1

    def test_one_run_gives_the_cells_of_its_shots(self, compared: Project) -> None:
        first, last = (line for line in lines(compared) if line["row"] == "in shots")
        assert (first["shots"], last["shots"]) == ("1", "2")
        single = next(line for line in lines(compared) if (line["row"], line["sparsity"]) == ("llm-surgeon", "0.1"))
        assert first["perplexity"] == single["perplexity"]

    def test_seconds_are_those_of_the_records(self, compared: Project) -> None:
        store = Store(compared.data / "store")
        total: dict[str, float] = {}
        for key in compared.labels():
            kind, record = store.lookup(key).kind, store.record(key)  # type: ignore[union-attr]
            total[kind] = total.get(kind, 0.0) + record["seconds"]
            assert 0.05 < record["peak_memory_gib"] < 8
        last = [line for line in lines(compared) if line["row"] == "in shots"][-1]
        assert 0 < float(last["statistics_s"]) < total["input-factors"] + total["output-factors"]
        assert 0 < float(last["update_s"]) < total["update"]
        assert 0 < float(last["costs_mask_s"]) < total["costs"] + total["mask"]

    def test_best_is_bold(self, compared: Project) -> None:
        text = written(compared)["comparison.md"].decode()
        for sparsity in ("0.1", "0.2"):
            values = [
                float(line["perplexity"])
                for line in lines(compared)
                if line["sparsity"] == sparsity and line["table"] == "Rows and columns"
            ]
            assert f"| **{min(values):.2f}** |" in text

    def test_protocol(self, compared: Project) -> None:
        text = written(compared)["comparison.md"].decode()
        assert "5 sequences of 32 tokens, 160 in all" in text
        assert "4 windows of 32 tokens, 128 in all" in text
        assert "- seed: 0, 3" in text
        assert "torch" in text
        assert "k-obd: method k-obd, shots 1, structure rows-and-columns, curvature kfac" in text


class TestAgain:
    def test_executes_nothing_and_writes_the_same(self, compared: Project, tmp_path: Path) -> None:
        again = compared.copy(tmp_path / "again")
        (again.root / "compare.yaml").write_bytes((compared.root / "compare.yaml").read_bytes())
        before = written(again)
        done = again.surgeon("compare", "compare.yaml", "--json").ok()
        assert again.read("timings/compare.json")["executed"] == 0
        assert written(again) == before
        assert yaml.safe_load(done.stdout) == again.read("compare/comparison.json")

    @pytest.mark.parametrize("k", [9, 30])
    def test_killed_half_way(self, compared: Project, params: dict[str, Any], tmp_path: Path, k: int) -> None:
        project = put_spec(Project(tmp_path / "project", params))
        started = project.start("compare", "compare.yaml", "--quiet")
        while started.process.is_alive() and len(list(project.objects.glob("*/*"))) < k:
            time.sleep(0.001)
        started.kill()
        assert started.wait().status == -9
        assert not (project.data / "compare").exists()
        project.surgeon("compare", "compare.yaml", "--quiet").ok()
        assert project.contents() == compared.contents()
        for name in ("comparison.json", "comparison.png"):
            assert written(project)[name] == written(compared)[name]
        assert lines(project, TIMED) == lines(compared, TIMED)
        assert not [path.name for path in (project.data / "compare").iterdir() if path.name.startswith(".")]

    def test_command_line_wins(self, compared: Project, tmp_path: Path) -> None:
        again = compared.copy(tmp_path / "again")
        put_spec(again, {**SPEC, "tables": SPEC["tables"][:1]})
        again.surgeon("compare", "compare.yaml", "-S", "prune.update=none", "-S", "prune.method=llm-surgeon").ok()
        found = {line["row"]: line["perplexity"] for line in lines(again) if line["sparsity"] == "0.1"}
        assert found["llm-surgeon"] == found["k-obd"] == found["in shots"]


def changed(**changes: Any) -> dict[str, Any]:
    """The spec with one table, changed."""
    return {"tables": [{**SPEC["tables"][0], **changes}]}


def row(**changes: Any) -> dict[str, Any]:
    return changed(rows=[{"name": "x", **changes}])


BAD = {
    "unknown key": ({**SPEC, "table": []}, r"compare\.yaml: table: unknown section\. Did you mean 'tables'"),
    "unknown key of a row": (row(sets=[]), r"tables\.0\.rows\.0\.sets: unknown key\. Did you mean 'set'"),
    "no tables": ({}, r"tables: is missing"),
    "empty tables": ({"tables": []}, r"tables: must have at least one entry"),
    "no title": ({"tables": [{"rows": [{"name": "x"}], "sparsities": [0.1]}]}, r"tables\.0\.title: is missing"),
    "no list": (row(set="prune.shots=1"), r"rows\.0\.set: got 'prune\.shots=1'; must be a list"),
    "row that is text": (changed(rows=["x"]), r"rows\.0: got 'x'; it is a section with the keys name, set, from_shots"),
    "sparsity": (changed(sparsities=[0.1, 1]), r"sparsities\.1: got 1; must be less than 1"),
    "order": (changed(sparsities=[0.2, 0.1]), r"tables\.0: sparsities: must be given from the lowest to the highest"),
    "row twice": (changed(rows=[{"name": "x"}, {"name": "x"}]), r"tables\.0: rows: the name 'x' is given twice"),
    "title twice": ({"tables": [SPEC["tables"][1]] * 2}, r"tables: the title 'Rows' is given twice"),
    "dense": (row(name="dense"), r"name: got 'dense'; is the row of the model before pruning"),
    "other terms": (
        row(set=["calibrate.sequences=9"]),
        r"row 'x': set: calibrate\.sequences=9: rows must have the same",
    ),
    "other model": (changed(set=["model.source=y"]), r"table 'Rows and columns': set: model\.source=y: .* same model"),
    "typing error": (
        row(set=["prune.sots=9"]),
        r"row 'x': -S prune\.sots=9: prune\.sots: unknown key\. Did you mean 'shots'",
    ),
    "no value": (row(set=["prune.shots"]), r"row 'x': -S prune\.shots: has no '='"),
    "sparsity of a row": (
        row(set=["prune.sparsity=0.3"]),
        r"row 'x': prune\.sparsity=0\.3: the sparsities are those of",
    ),
    "sparsity in a section": (
        row(set=["prune={sparsity: 0.3}"]),
        r"row 'x': .* the sparsities are those of the tables",
    ),
    "sparsity of all": (
        {**SPEC, "set": ["prune.sparsity=0.3"]},
        r"compare\.yaml: prune\.sparsity=0\.3: the sparsities",
    ),
    "no effect": (row(set=["prune.rank=3"]), r"row 'x': .*rank: 3 has no effect with curvature: kfac"),
    "schedule": (
        row(set=["prune.shots=3"], from_shots=True),
        r"row 'x': from_shots: 3 shots to 20% pass through 6\.66667%, 13\.3333%, 20%, not through 10%; choose",
    ),
    "pattern": (
        row(set=["prune.structure=1:5"]),
        r"1:5 needs inputs that divide into groups of 5, but block 0, linear",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_spec(params: dict[str, Any], tmp_path: Path, case: str) -> None:
    spec, message = BAD[case]
    project = put_spec(Project(tmp_path / "project", params), spec)
    with pytest.raises(ParameterError, match=message):
        file = project.root / "compare.yaml"
        runs = plan_runs(load_spec(file), file, project.root / "params.yaml", [])
        compare.compare_all(Session(runs[0].params, Workspace(project.root), InlineEngine()), runs)
    assert not project.labels()


def test_bad_spec_of_the_command(params: dict[str, Any], tmp_path: Path) -> None:
    project = put_spec(Project(tmp_path / "project", params))
    for arguments, message in {
        ("missing.yaml",): "There is no parameter file missing.yaml",
        ("compare.yaml", "-S", "prune.sparsity=0.3"): "the command line: prune.sparsity=0.3: the sparsities are those",
        ("compare.yaml", "-S", "prune.shots=0"): "prune.shots: got 0",
    }.items():
        done = project.surgeon("compare", *arguments)
        assert done.status == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not project.data.exists()


def test_a_cell_that_fails_does_not_stop_the_others(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = put_spec(Project(tmp_path / "project", params), {"tables": SPEC["tables"][:1]})
    file = project.root / "compare.yaml"
    runs = plan_runs(load_spec(file), file, project.root / "params.yaml", [])
    works = compare.prune

    def prune(session: Session) -> Any:
        if session.params.prune.method == "k-obd" and session.params.prune.target_sparsity == 0.2:
            raise NumericalError("block 1, linear x | y:\nnot positive")
        return works(session)

    monkeypatch.setattr(compare, "prune", prune)
    session = Session(runs[0].params, Workspace(project.root), InlineEngine())
    comparison = compare.compare_all(session, runs)
    with pytest.raises(
        SurgeonError, match=r"1 of 6 cells failed, .*k-obd at 20%: block 1, linear x \| y: not positive"
    ):
        comparison.raise_failures(session.workspace.comparison)
    assert set(project.read("compare/comparison.json")["Rows and columns"]["k-obd"]) == {"10%"}
    text = written(project)["comparison.md"].decode()
    assert "| failed |" in text
    assert r"- k-obd at 20%: block 1, linear x \| y: not positive" in text
    failed = [line for line in lines(project) if line["error"]]
    assert [(line["row"], line["sparsity"], line["perplexity"]) for line in failed] == [("k-obd", "0.2", "")]


HOSTILE = [
    "a | b",
    "two\nlines",
    "<script>alert('x')</script>",
    'quote " and, comma',
    "**bold** `code`",
    "[x](y)",
    "$x_",
    "_",
]


def hostile() -> Comparison:
    cells = [Cell(s, 1, s, 40 + 100 * s, 3.0, usage=Usage(1, 2, 3, 4, 0.5)) for s in (0.1, 0.2)]
    rows = [Row(name, f"settings of {name}", cells) for name in HOSTILE]
    rows.append(Row("failed", "s", [Cell(0.1, 1, error="x | <b>"), Cell(0.2, 1, error="y\n\n# z")]))
    one = [Row(name, "s", cells[:1]) for name in HOSTILE]
    return Comparison(
        {"perplexity": 30.0, "loss": 3.4}, {"model": "a\nb"}, [Table("T | <i>\n# x", rows), Table("one", one)]
    )


def test_names_do_not_break_markdown() -> None:
    text = markdown(hostile())
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {line.replace(r"\|", "").count("|") for line in table}
    assert columns == {1 + 1 + 2 + 5, 1 + 1 + 1 + 5}
    assert "<" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Comparison",
        r"## T \| &lt;i&gt; \# x",
        "## one",
    ]
    assert plain("**bold** `code`") == r"\*\*bold\*\* \`code\`"


def test_names_do_not_break_csv() -> None:
    text = long_form(hostile())
    found = list(csv.DictReader(io.StringIO(text)))
    assert tuple(found[0]) == FIELDS
    assert [line["row"] for line in found[1::2]][: len(HOSTILE)] == HOSTILE
    assert {line["table"] for line in found} == {"T | <i>\n# x", "one"}


def test_names_do_not_break_the_plot() -> None:
    picture = draw_comparison(hostile())
    assert picture.startswith(b"\x89PNG")
    assert draw_comparison(hostile()) == picture


def test_a_row_out_of_reach_is_named_before_any_work(again: Project) -> None:
    rows = [{"name": "far", "set": ["prune.structure=units", "prune.multiple=8"]}]
    put_spec(again, {"tables": [{"title": "Units", "sparsities": [0.2, 0.9], "rows": rows}]})
    before = again.labels()
    done = again.surgeon("compare", "compare.yaml", "--quiet")
    assert done.status == 2
    assert "far at 90% (Units): prune.sparsity: 0.9: the target leaves" in done.stderr
    assert again.labels() == before
