"""The JSON schema of the parameters, as a form is made from it: what each is for, and which values it takes.

What a parameter is for is said once, by its comment in `params.yaml`; this adds the comments of the file that lies
beside the package to the schema. (An installed package without that file has a form without them.)
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

COMMENTED = Path(__file__).parents[1] / "params.yaml"
_LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")
_MORE = re.compile(r"^ *#\s*(?P<comment>.*)$")
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""Pydantic keeps its own names for limits of values that it prepares before it checks them."""


class FormSchema:
    """Annotation of a parameter: its JSON schema is that of the form."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Pydantic's schema of the sections, with comments and with limits that JSON Schema knows."""
        schema = handler(core)
        comments = read_comments(COMMENTED) if COMMENTED.is_file() else {}
        for location, section in _sections(schema, handler):
            for key, found in section["properties"].items():
                _name_limits(found)
                if comment := comments.get((*location, key)):
                    found.setdefault("description", comment)
        return schema


def read_comments(path: Path) -> dict[tuple[str, ...], str]:
    """Comments of a YAML file of sections, by the keys that lead to the value they are beside.

    Args:
        path: a file with a key and its value on each line; a comment may go on in the lines that follow.
    """
    comments: dict[tuple[str, ...], str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if (more := _MORE.match(line)) and above:
            location = tuple(key for _, key in above)
            comments[location] = f"{comments.get(location, '')} {more['comment']}".strip()
        if found := _LINE.match(line):
            indent = len(found["indent"])
            above = [*(outer for outer in above if outer[0] < indent), (indent, found["key"])]
            if found["comment"]:
                comments[tuple(key for _, key in above)] = found["comment"].strip()
    return comments


def _sections(
    schema: Mapping[str, Any], handler: GetJsonSchemaHandler, location: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """All sections below a schema, with the keys that lead to them."""
    found = handler.resolve_ref_schema(dict(schema))
    if "properties" not in found:
        return
    yield location, found
    for key, inner in found["properties"].items():
        for choice in inner.get("anyOf", [inner]):
            if "$ref" in choice:
                yield from _sections(choice, handler, (*location, key))


def _name_limits(schema: dict[str, Any]) -> None:
    for name, proper in _LIMITS.items():
        if name in schema:
            schema[proper] = schema.pop(name)
    for inner in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        _name_limits(inner)
