"""`surgeon inspect`: which view is wanted, as a table, as JSON and as a plot."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.inspection.block import inspect_block
from flows.inspection.objects import list_objects
from flows.inspection.opening import check_plot
from flows.inspection.render import render_block, render_objects, render_run
from flows.inspection.run import inspect_run
from flows.session import Session
from surgeon.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


@dataclass(frozen=True)
class Wanted:
    """Options of the command.

    Attributes:
        block: to look into; None for the whole run.
        linear: of the block; None for all.
        shot: None for the last.
        objects: list those of the run.
        store: list all of the store.
        plot: file to draw to.
    """

    block: int | None = None
    linear: str | None = None
    shot: int | None = None
    objects: bool = False
    store: bool = False
    plot: Path | None = None

    def check(self) -> None:
        """Refuses options that contradict each other or have no effect, and a plot that cannot be written.

        Raises:
            InputError: naming the option.
        """
        if self.objects and self.store:
            raise InputError("--objects and --store exclude each other: the store has the objects of all runs")
        given = {"--block": self.block, "--linear": self.linear, "--shot": self.shot}
        if self.objects or self.store:
            for option, value in given.items():
                if value is not None:
                    raise InputError(f"{option} has no effect with {'--store' if self.store else '--objects'}")
        if self.linear is not None and self.block is None:
            raise InputError("--linear needs --block: which block's linear?")
        check_plot(self.plot)


@dataclass(frozen=True)
class Seen:
    """A view.

    Attributes:
        value: all of it, for JSON.
        draw: puts it on a console.
    """

    value: Any
    draw: "Callable[[Console], None]"


def look_in(session: Session, wanted: Wanted) -> Seen:
    """Makes the view that is wanted, and its plot."""
    workspace = session.workspace
    figure: Callable[[], Figure]
    if wanted.objects or wanted.store:
        objects = list_objects(workspace, whole_store=wanted.store)
        seen = Seen(objects, partial(render_objects, objects))
        figure = partial(_draw, "draw_objects", objects)
    elif wanted.block is not None:
        block = inspect_block(workspace, session.engine, wanted.block, wanted.linear, wanted.shot)
        seen = Seen(block.to_json(), partial(render_block, block))
        figure = partial(_draw, "draw_block", block)
    else:
        run = inspect_run(workspace, wanted.shot)
        seen = Seen(run.to_json(), partial(render_run, run))
        figure = partial(_draw, "draw_run", run)
    if wanted.plot is not None:
        from flows.inspection.plots import save

        save(figure(), wanted.plot)
    return seen


def _draw(name: str, view: Any) -> "Figure":
    from flows.inspection import plots

    figure: Figure = getattr(plots, name)(view)
    return figure
