"""What the definition of a task depends on, as one digest: the version of lm-eval, and the user's own files."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from surgeon.errors import TaskError
from surgeon.store.keys import canonical_json, digest_file, digest_text

PACKAGE = "lm_eval"
INSTALL = 'pip install "surgeon[tasks]", or pip install lm-eval'
_DATA_FIELDS = ("data_files", "data_dir")
_IGNORED = ("__pycache__", ".ipynb_checkpoints")


def harness_version() -> str:
    """The version of lm-eval that is installed.

    Raises:
        TaskError: it is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise TaskError(f"downstream tasks need lm-eval, which is not installed. Install it with: {INSTALL}") from error


def definition_digest(include: Path | None) -> str:
    """Digest of everything on this machine that defines tasks.

    It covers the version of lm-eval, every file of the user's directory, and the data files outside of it that its
    definitions name. Data sets of the hub go by the name that the definition gives them.

    Args:
        include: directory with definitions of the user's own, or None.

    Raises:
        TaskError: the directory does not exist or holds no definition, or lm-eval is not installed.
    """
    parts: list[tuple[str, str]] = []
    if include is not None:
        files = _files(include)
        definitions = [file for file in files if file.suffix == ".yaml"]
        if not definitions:
            raise TaskError(f"{include} is not a directory with definitions of tasks: it holds no .yaml file")
        parts = [(file.relative_to(include).as_posix(), digest_file(file)) for file in files]
        parts += [(str(file), digest_file(file)) for file in _data_outside(include, definitions)]
    return digest_text(canonical_json({"lm_eval": harness_version(), "files": parts}))


def local_data(definition: Path, named: str) -> Path | None:
    """Where a file or directory of data is that a definition names: beside the definition, or from here; else None."""
    return next((place for place in (definition.parent / named, Path(named)) if place.exists()), None)


def named_data(fields: object) -> Iterator[str]:
    """Every text below `data_files` or `data_dir` in a definition's `dataset_kwargs`."""
    if isinstance(fields, dict):
        for name in _DATA_FIELDS:
            yield from _texts(fields.get(name))


def _data_outside(include: Path, definitions: list[Path]) -> list[Path]:
    found: set[Path] = set()
    for definition in definitions:
        for named in named_data(_read(definition).get("dataset_kwargs")):
            place = local_data(definition, named)
            if place is not None and include.resolve() not in place.resolve().parents:
                found |= set(_files(place)) if place.is_dir() else {place}
    return sorted(found)


def _read(definition: Path) -> dict[str, Any]:
    """A definition without its functions; what is no YAML mapping is empty, for lm-eval leaves it out as well."""
    try:
        content = yaml.load(definition.read_bytes(), Loader=_Loader)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


class _Loader(yaml.SafeLoader):
    """Plain YAML; what a tag such as `!function` stands for is left as its text."""


def _tagged(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> object:
    return loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None


_Loader.add_multi_constructor("!", _tagged)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _files(directory: Path) -> list[Path]:
    """All files below a directory, sorted, without what Python leaves there."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part in _IGNORED for part in path.parts))
