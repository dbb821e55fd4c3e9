"""What stages have found, as tables and texts for the page of a Prefect run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.compare_spec import DENSE, percent
from flows.comparison import Comparison, show_perplexity
from flows.engine import Finding
from flows.render import result_rows
from flows.workspace import Workspace


def shots_finding(shots: Sequence[Mapping[str, Any]]) -> Finding:
    """A row for each shot: sparsity asked for and reached, and perplexity."""
    rows = [
        {
            "shot": str(shot["shot"]),
            "asked": f"{shot['target']:.2%}",
            "reached": f"{shot['sparsity']:.3%}",
            "perplexity": show_perplexity(shot["perplexity"]),
        }
        for shot in shots
    ]
    return Finding("shots", "Sparsity and perplexity after each shot", tuple(rows))


def results_finding(results: Mapping[str, Any]) -> Finding:
    """The table that a run ends with: perplexity, parameters, bytes and speed of the dense and the pruned model."""
    rows = [
        {"": name, "dense": dense, "pruned": pruned, "ratio": ratio}
        for name, dense, pruned, ratio in result_rows(results)
    ]
    return Finding("results", f"{results['provenance']['model']['source']}: dense and pruned", tuple(rows))


def files_finding(workspace: Workspace) -> Finding:
    """Where the report, the numbers and the pruned model are, as links for a browser on the machine of the run."""
    places = {
        "report": (workspace.report, "what was removed, where, and what it cost"),
        "run.json": (workspace.metrics, "all numbers, for scripts"),
        "export": (workspace.export, "the pruned checkpoint"),
    }
    return Finding("files", "Report, numbers and model", text=_links(places))


def evaluation_finding(facts: Mapping[str, Any]) -> Finding:
    """One model's numbers."""
    rows = [
        {"": name, "value": f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"}
        for name, value in facts.items()
        if isinstance(value, int | float)
    ]
    return Finding("evaluation", "Evaluation", tuple(rows))


def comparison_findings(comparison: Comparison, folder: Path) -> tuple[Finding, Finding]:
    """A row for each cell of a comparison, and where its tables and plots are."""
    dense = {"table": "", "method": DENSE, "sparsity": percent(0.0)}
    rows = [{**dense, "perplexity": show_perplexity(comparison.dense["perplexity"]), "after recovery": ""}]
    for table in comparison.tables:
        for row in table.rows:
            rows += [
                {
                    "table": table.title,
                    "method": row.name,
                    "sparsity": percent(cell.sparsity),
                    "perplexity": _shown(cell.perplexity, cell.error),
                    "after recovery": _shown(cell.recovered, None),
                }
                for cell in row.cells
            ]
    text = _links({"comparison": (folder, "tables and plots")})
    return Finding("comparison", "Perplexity by method and sparsity", tuple(rows)), Finding("files", "Files", text=text)


def _shown(perplexity: float | None, error: str | None) -> str:
    if perplexity is None:
        return f"failed: {error}" if error else ""
    return show_perplexity(perplexity)


def _links(places: Mapping[str, tuple[Path, str]]) -> str:
    return "".join(f"- [{name}]({path.as_uri()}): {what} (`{path}`)\n" for name, (path, what) in places.items())
