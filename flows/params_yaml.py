"""Reads YAML parameters and merges overrides of the command line into them."""

from pathlib import Path
from typing import Any

import yaml

from surgeon.errors import ParameterError

_EXAMPLE = "-S prune.sparsity=0.3"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and reads 2:4 as text.

    PyYAML lets the second key win in silence, and reads numbers in base 60 as YAML 1.1 has them: 2:4 would be 124.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """The tag of a node that has none; a number has no colon."""
        tag = super().resolve(kind, value, implicit)
        return _TEXT if tag in _NUMBERS and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping after checking that its keys differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Reads a YAML file of sections; an empty file has none.

    Raises:
        ParameterError: The file is missing, is not YAML, or is not made of sections.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ParameterError(f"There is no parameter file {path} ({path.absolute()}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"Parameter file {path} cannot be read: {error}.") from error
    try:
        # The loader is a SafeLoader: it builds plain values only.
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ParameterError(f"{path}{_position(error)}: not valid YAML: {_reason(error)}.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ParameterError(f"{path}: must hold sections such as 'prune:'; got {type(tree).__name__} {tree!r:.60}.")
    return tree


def apply_override(tree: dict[Any, Any], override: str) -> tuple[str, ...]:
    """Sets one value in a tree of sections.

    Args:
        tree: Sections, changed in place.
        override: `section.key=value`.

    Returns:
        The keys on the way to the value.

    Raises:
        ParameterError: The override is not of that form, its value is not YAML, or its way leads through a value.
    """
    name, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in name.split("."))
    if not equals:
        raise ParameterError(f"-S {override}: has no '='; write section.key=value, such as {_EXAMPLE}.")
    if not all(keys):
        raise ParameterError(f"-S {override}: the key {name!r} has an empty part; write it as in {_EXAMPLE}.")
    if not text.strip():
        raise ParameterError(f'-S {override}: has no value; write null for none or "" for an empty text.')
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ParameterError(f"-S {override}: the value is not valid YAML: {_reason(error)}. Quote it.") from error
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            above = ".".join(keys[:depth])
            raise ParameterError(f"-S {override}: {above} is {node[key]!r}, which has no keys; set {above} itself.")
        node = node[key]
    node[keys[-1]] = value
    return keys


def _position(error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return problem or " ".join(str(error).split())
