"""What `surgeon compare` is asked for: tables of methods by sparsity, on equal terms.

All rows share the model, the calibration and the evaluation; only `prune.*`, `recovery.*` and `seed` may differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StrictBool, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flows.params import Params, load_params
from flows.params_problems import describe, raise_problems
from flows.params_section import Number, Section, Word
from flows.params_yaml import apply_override, read_yaml
from flows.schedule import shot_target
from surgeon.errors import ParameterError

DENSE = "dense"
"""Name of the row of the model before pruning."""
FREE_SECTIONS = ("prune", "recovery", "seed")
"""What may differ between rows."""
_SAME_TARGET = 1e-9

_Sparsity = Annotated[Number, Field(gt=0, lt=1)]
_Set = tuple[Word, ...]


class RowSpec(Section):
    """One method with its settings.

    Attributes:
        name: as in the table.
        set: overrides, as after `-S`.
        from_shots: one run to the last sparsity, whose shots pass through the others.
    """

    name: Word
    set: _Set = ()
    from_shots: StrictBool = False

    @field_validator("name")
    @classmethod
    def _not_dense(cls, name: str) -> str:
        if name == DENSE:
            raise PydanticCustomError("dense", "is the row of the model before pruning, which is always there")
        return name


class TableSpec(Section):
    """One table, and one panel of the plot.

    Attributes:
        title: above it.
        set: overrides for all its rows.
        sparsities: its columns, from the lowest.
        rows: its rows.
    """

    title: Word
    set: _Set = ()
    sparsities: Annotated[tuple[_Sparsity, ...], Field(min_length=1)]
    rows: Annotated[tuple[RowSpec, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.sparsities) != sorted(set(self.sparsities)):
            raise PydanticCustomError("order", "sparsities: must be given from the lowest to the highest, each once")
        _require_unique("rows: the name", [row.name for row in self.rows])
        return self


class CompareSpec(Section):
    """All tables.

    Attributes:
        set: overrides for everything.
        tables: in order.
    """

    set: _Set = ()
    tables: Annotated[tuple[TableSpec, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_unique("tables: the title", [table.title for table in self.tables])
        return self


@dataclass(frozen=True)
class Run:
    """One run of pruning, for one or more cells of a row.

    Attributes:
        table: title.
        row: name.
        sparsities: the cells it fills; the last is its target.
        params: all parameters of the run.
    """

    table: str
    row: str
    sparsities: tuple[float, ...]
    params: Params

    @property
    def label(self) -> str:
        """How it is called while it runs."""
        return f"{self.row} at {', '.join(percent(sparsity) for sparsity in self.sparsities)}"


def percent(fraction: float) -> str:
    """A sparsity as it is shown."""
    return f"{100 * fraction:.6g}%"


def load_spec(path: Path) -> CompareSpec:
    """Reads the file.

    Raises:
        ParameterError: listing all that is wrong with it.
    """
    tree = read_yaml(path)
    try:
        return CompareSpec.model_validate(tree)
    except ValidationError as error:
        raise_problems(describe(error, CompareSpec, str(path), {}))
        raise  # raise_problems has raised


def plan_runs(spec: CompareSpec, source: Path, params_file: Path | None, overrides: Sequence[str]) -> list[Run]:
    """Checks every row of every table, and lists the runs that fill the cells.

    Args:
        spec: the tables.
        source: file they were read from, for messages.
        params_file: parameters that everything starts from; None is the defaults.
        overrides: of the command line; they win over all that the file sets.

    Raises:
        ParameterError: naming table, row and what is wrong there.
    """
    _require_no_sparsity(spec.set, str(source))
    _require_no_sparsity(overrides, "the command line")
    runs = []
    for table in spec.tables:
        _require_free(table.set, f"{source}: table {table.title!r}")
        for row in table.rows:
            where = f"{source}: table {table.title!r}, row {row.name!r}"
            _require_free(row.set, where)
            cells = [table.sparsities] if row.from_shots else [(sparsity,) for sparsity in table.sparsities]
            for cell in cells:
                target = f"prune.sparsity={cell[-1]!r}"
                given = [*spec.set, *table.set, *row.set, *overrides, target]
                try:
                    params = load_params(params_file, given)
                except ParameterError as error:
                    raise ParameterError(f"{where}: {error}") from error
                run = Run(table.title, row.name, cell, params)
                _require_on_schedule(run, where)
                runs.append(run)
    return runs


def shots_of(run: Run) -> list[int]:
    """For each cell that a run fills, the shot after which its sparsity is reached; 0 if none is."""
    targets = _schedule(run)
    return [
        next((n for n, target in enumerate(targets, start=1) if abs(target - sparsity) < _SAME_TARGET), 0)
        for sparsity in run.sparsities
    ]


def _schedule(run: Run) -> list[float]:
    target = run.params.prune.target_sparsity
    n_shots = run.params.prune.n_shots(target)
    return [shot_target(target, number, n_shots) for number in range(1, n_shots + 1)]


def _require_unique(what: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PydanticCustomError("twice", "{what} {name} is given twice", {"what": what, "name": repr(twice)})


def _require_on_schedule(run: Run, where: str) -> None:
    if 0 in (shots := shots_of(run)):
        missed = ", ".join(percent(s) for s, shot in zip(run.sparsities, shots, strict=True) if not shot)
        reached = _schedule(run)
        raise ParameterError(
            f"{where}: from_shots: {len(reached)} shots to {percent(run.sparsities[-1])} pass through "
            f"{', '.join(map(percent, reached))}, not through {missed}; choose prune.shots to hit all of them, or "
            "leave from_shots out, for a run to each"
        )


def _require_free(overrides: Sequence[str], where: str) -> None:
    """Refuses overrides that would make rows differ in more than pruning."""
    for override, tree in _parsed(overrides, where):
        if (section := next(iter(tree))) not in FREE_SECTIONS:
            raise ParameterError(
                f"{where}: set: {override}: rows must have the same {section}, to be compared on equal terms; only "
                f"{', '.join(FREE_SECTIONS)} may differ. Set it for all tables at the top of the file, or with -S"
            )
    _require_no_sparsity(overrides, where)


def _require_no_sparsity(overrides: Sequence[str], where: str) -> None:
    for override, tree in _parsed(overrides, where):
        prune = tree.get("prune")
        if isinstance(prune, dict) and "sparsity" in prune:
            raise ParameterError(f"{where}: {override}: the sparsities are those of the tables; leave it out")


def _parsed(overrides: Sequence[str], where: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Each override with the tree that it alone makes."""
    for override in overrides:
        tree: dict[Any, Any] = {}
        try:
            apply_override(tree, override)
        except ParameterError as error:
            raise ParameterError(f"{where}: {error}") from error
        yield override, tree
