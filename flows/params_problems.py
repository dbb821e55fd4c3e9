"""Says what is wrong with parameters: where it was given, the value got, what is allowed, what may have been meant."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from surgeon.errors import ParameterError
from surgeon.text.suggest import did_you_mean

_Location = tuple[int | str, ...]


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one error that lists all problems, if there are any.

    Raises:
        ParameterError: There are.
    """
    if len(problems) == 1:
        raise ParameterError(problems[0])
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ParameterError(f"{len(problems)} problems with the parameters:{listed}")


def describe(
    error: ValidationError, root: type[BaseModel], where: str, overrides: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Turns every problem that pydantic found into a line.

    Args:
        error: What pydantic found.
        root: Model of all sections.
        where: Name of the parameter file.
        overrides: Overrides as they were given, and the keys each sets.

    Returns:
        One line per problem.
    """
    lines = []
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        name = ".".join(map(str, location))
        origin = _origin(location, where, overrides)
        reason = _reason(detail, root) if name else detail["msg"]
        lines.append(": ".join(part for part in (origin, name, _sentence(reason)) if part))
    return lines


def _origin(location: _Location, where: str, overrides: Mapping[str, tuple[str, ...]]) -> str:
    """The last override that sets this value or something around it, or all overrides inside it; else the file."""
    around = [override for override, keys in overrides.items() if location[: len(keys)] == keys]
    inside = [override for override, keys in overrides.items() if location and keys[: len(location)] == location]
    return ", ".join(f"-S {override}" for override in around[-1:] or inside) or where


def _reason(detail: ErrorDetails, root: type[BaseModel]) -> str:
    kind, got = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(detail["loc"], root)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = ", ".join(_section(root, detail["loc"]).model_fields)
        return f"got {_show(got)}; it is a section with the keys {keys}"
    if kind == "enum":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"got {_show(got)}; allowed: {', '.join(allowed)}.{did_you_mean(str(got), allowed)}"
    if kind == "bool_type":
        return f"got {_show(got)}; allowed: true, false"
    if kind == "string_type":
        return f"got {_show(got)}; must be text, so put it in quotes"
    if kind == "tuple_type":
        return f"got {_show(got)}; must be a list"
    if kind == "too_short":
        return "must have at least one entry"
    if kind == "missing":
        return "is missing"
    if kind == "string_too_short":
        return "got an empty text; must have at least one character"
    if isinstance(got, Mapping):  # a whole section: the message names what in it is wrong
        return detail["msg"]
    message = detail["msg"].replace("Input should be", "must be")
    return f"got {_show(got)}; {message}"


def _unknown_key(location: _Location, root: type[BaseModel]) -> str:
    allowed = list(_section(root, location[:-1]).model_fields)
    what = "key" if len(location) > 1 else "section"
    return f"unknown {what}.{did_you_mean(str(location[-1]), allowed)} Allowed: {', '.join(allowed)}"


def _section(root: type[BaseModel], location: _Location) -> type[BaseModel]:
    """The model class of a section by the keys that lead to it."""
    section: Any = root
    for key in location:
        # The entries of a list are all of the type in `tuple[Type, ...]`.
        section = get_args(section)[0] if isinstance(key, int) else section.model_fields[key].annotation
    return section  # type: ignore[no-any-return]


def _sentence(text: str) -> str:
    """Text with a full stop, unless it ends a sentence already."""
    return text if text.endswith((".", "?")) else f"{text}."


def _show(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
