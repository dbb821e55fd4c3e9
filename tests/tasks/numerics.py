"""Digests of the source that the numbers of each stage depend on, beside the version they were recorded with.

`python -m tests.tasks.numerics` records them. Comments, docstrings and the form of the code do not count.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
import pkgutil
from pathlib import Path

import flows
import tasks
from tasks.stage import Stage

RECORD = Path(__file__).with_name("numerics.json")
Entry = dict[str, int | str]


def stages() -> dict[str, Stage]:
    """Every stage that a module of tasks or flows defines, by kind."""
    found: dict[str, Stage] = {}
    for package in (tasks, flows):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, Stage):
                    assert found.setdefault(value.kind, value) == value, f"two stages are called {value.kind!r}"
    return found


def source_digest(text: str) -> str:
    """SHA-256 of the syntax tree of a source without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_text(item)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def stage_digest(stage: Stage) -> str:
    """Digest of all modules that the numbers of a stage depend on."""
    digests = [f"{name} {source_digest(_file(name).read_text())}" for name in sorted(stage.sources)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def current() -> dict[str, Entry]:
    """What would be recorded now."""
    return {kind: {"version": s.version, "source": stage_digest(s)} for kind, s in sorted(stages().items())}


def recorded() -> dict[str, Entry]:
    """What was recorded."""
    entries: dict[str, Entry] = json.loads(RECORD.read_text())
    return entries


def _file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    assert spec.origin is not None, f"{module} has no source"
    return Path(spec.origin)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


if __name__ == "__main__":
    RECORD.write_text(json.dumps(current(), indent=2) + "\n")
