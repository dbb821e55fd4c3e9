"""Imports go one way: flows → tasks → surgeon, and only a few modules of flows know Prefect and DVC."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "surgeon": {"tasks", "flows", "prefect", "dvc", "typer"},
    "tasks": {"flows", "prefect", "dvc", "typer"},
    "flows": {"tests"},
}
PREFECT = {f"prefect_{name}.py" for name in ("artifacts", "deployments", "engine", "runs", "server")}


def imported(source: str) -> set[str]:
    """Top-level packages that a source imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    wrong = {str(f.relative_to(ROOT)): bad for f in files if (bad := imported(f.read_text()) & FORBIDDEN[package])}
    assert wrong == {}


@pytest.mark.parametrize(("package", "modules"), [("prefect", PREFECT), ("dvc", {"revisions.py"})])
def test_few_modules_import(package: str, modules: set[str]) -> None:
    users = {path.name for path in (ROOT / "flows").rglob("*.py") if package in imported(path.read_text())}
    assert users == modules


def test_imports_are_found_wherever_they_are() -> None:
    source = "import os.path\nfrom prefect.states import X\ndef f():\n    import dvc.api as d\n    from . import near\n"
    assert imported(source) == {"os", "prefect", "dvc"}


@pytest.mark.parametrize("package", ["surgeon", "tasks"])
def test_library_does_not_print(package: str) -> None:
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"

    files = sorted((ROOT / package).rglob("*.py"))
    assert [f.name for f in files if any(prints(node) for node in ast.walk(ast.parse(f.read_text())))] == []
