"""The form of a deployment: what each parameter is for, from params.yaml, and limits that JSON Schema knows."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from flows.params import Params
from flows.params_form import COMMENTED, FormSchema, read_comments
from flows.params_section import Integer, Section
from flows.params_text import TextParams


class Inner(Section):
    count: Annotated[Integer, Field(ge=2, lt=5)] = 2
    counts: tuple[Annotated[Integer, Field(gt=0)], ...] | None = None


class Outer(Section):
    inner: Inner = Inner()


def test_comments(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "# Not of a key.\n"
        "seed: 0              # of draws\n"
        "\n"
        "prune:               # what is removed\n"
        "  method: a          # a | b\n"
        "                     # | c\n"
        "  inner:\n"
        '    deep: "x: y"     # far down\n'
        "  last: 1e-3\n"
    )
    assert read_comments(path) == {
        ("seed",): "of draws",
        ("prune",): "what is removed",
        ("prune", "method"): "a | b | c",
        ("prune", "inner", "deep"): "far down",
    }


def test_limits_are_those_of_json_schema() -> None:
    schema: Any = TypeAdapter(Annotated[Outer, FormSchema()]).json_schema()
    count = schema["$defs"]["Inner"]["properties"]["count"]
    assert {name: count[name] for name in ("minimum", "exclusiveMaximum")} == {"minimum": 2, "exclusiveMaximum": 5}
    assert not {name for name in ("ge", "gt", "le", "lt") if f"'{name}'" in str(schema)}


def test_every_parameter_is_described() -> None:
    """A parameter without a comment in params.yaml is a field of the form that says nothing."""
    comments = read_comments(COMMENTED)

    def missing(section: type[Section], above: tuple[str, ...] = ()) -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= missing(kind, (*above, name))
            elif (*above, name) not in comments:
                found.add(".".join((*above, name)))
        return found

    # It is of the same class as calibrate.text, and a class has one description.
    assert missing(Params) == {f"evaluate.text.{name}" for name in TextParams.model_fields}
