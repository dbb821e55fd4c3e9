"""The section about curvature: spectra of its factors, damping, and how solvers ended."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flows.anatomy import Anatomy, DampingFacts
from flows.report.inputs import BlockSpectra, ReportInputs
from flows.report.numbers import rough
from flows.report.plots import CurveSet, SpectrumPanel, draw_spectra
from flows.report.tables import Table
from surgeon.curvature.spectrum import Spectrum

_SIDES = {"A": "inputs", "G": "output gradients"}
_POINTS = 160
"""Points of a drawn line at most."""


def curvature_section(inputs: ReportInputs) -> dict[str, Any]:
    """Spectra where they are known, damping and convergence."""
    return {**_spectra(inputs), **_damping(inputs.anatomy), **_solvers(inputs)}


def _spectra(inputs: ReportInputs) -> dict[str, Any]:
    if not inputs.spectra:
        return {"spectra_note": inputs.no_spectra, "spectra": None, "spectra_table": None}
    order = list(dict.fromkeys(linear.linear for linear in inputs.anatomy.linears))
    found = {
        block: {name: linears[name] for name in order if name in linears} for block, linears in inputs.spectra.items()
    }
    sides = [side for side in _SIDES if any(side in pair for block in found.values() for pair in block.values())]
    panels = [
        [SpectrumPanel(f"block {block}, {_SIDES[side]}", _lines(linears, side)) for block, linears in found.items()]
        for side in sides
    ]
    names = [name for name in order if any(name in linears for linears in found.values())]
    blocks = ", ".join(str(block) for block in found)
    description = (
        f"Eigenvalues of the factors of blocks {blocks}, from the largest to the smallest, on a logarithmic axis. "
        "A line that falls steeply belongs to a factor with few important directions. The table below has the "
        "condition numbers and effective ranks."
    )
    note = (
        f"Eigenvalues of the factors that the last shot measured, of the inputs and of the gradients at the outputs, "
        f"for blocks {blocks}. The steeper a line falls, the fewer directions matter. Linears that read the same input "
        "share a factor, which is drawn once."
    )
    return {
        "spectra_note": note,
        "spectra": draw_spectra(panels, names, description),
        "spectra_table": _spectra_table(found, inputs.anatomy.dampings),
    }


def _lines(linears: BlockSpectra, side: str) -> list[CurveSet]:
    lines, drawn = [], set()
    for name, sides in linears.items():
        if side not in sides or (content := sides[side].values.tobytes()) in drawn:
            continue
        drawn.add(content)
        values = sides[side].values[::-1]
        if values.size:
            chosen = np.unique(np.linspace(0, values.size - 1, min(_POINTS, values.size)).round().astype(int))
            lines.append(CurveSet(name, chosen / max(1, values.size - 1), values[chosen]))
    return lines


def _spectra_table(found: Mapping[int, BlockSpectra], dampings: Sequence[DampingFacts]) -> Table:
    relative = {(d.block, d.linear): {"A": d.activations, "G": d.gradients} for d in dampings}
    rows = [
        (
            f"{block}, {linear}",
            _SIDES[side],
            f"{spectrum.values.size:,}",
            f"{spectrum.effective_rank():,.0f}",
            _condition(spectrum, 0.0),
            _condition(spectrum, relative.get((block, linear), {}).get(side) or 0.0),
        )
        for block, linears in found.items()
        for linear, sides in linears.items()
        for side, spectrum in sides.items()
    ]
    head = ("block, linear", "factor of", "size", "effective rank", "condition", "damped condition")
    caption = "Factors over what lived before the last shot: largest eigenvalue over the smallest, and effective rank"
    return Table(caption, head, rows, left=(1,))


def _condition(spectrum: Spectrum, damping: float) -> str:
    condition = spectrum.condition(damping)
    return "none" if condition is None else rough(condition)


def _damping(anatomy: Anatomy) -> dict[str, Any]:
    used = [d for d in anatomy.dampings if d.activations or d.gradients]
    if not used:
        return {"damping_note": "Nothing was inverted, so nothing was damped.", "damping": None}
    kinds: dict[str, list[DampingFacts]] = {}
    for damping in used:
        kinds.setdefault(damping.linear, []).append(damping)
    rows = [
        (
            kind,
            _span([d.activations for d in mine]),
            _span([d.gradients for d in mine]),
            f"{sum(d.escalations or 0 for d in mine):,}",
        )
        for kind, mine in kinds.items()
    ]
    head = ("kind", "inputs", "output gradients", "times raised")
    note = (
        "What is added to the diagonal of a factor before it is inverted, in multiples of the mean of its diagonal, in "
        "the last shot. Where a factor could not be inverted, it was raised tenfold."
    )
    return {"damping_note": note, "damping": Table("From the smallest to the largest of all blocks", head, rows)}


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    low, high = min(known), max(known)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _solvers(inputs: ReportInputs) -> dict[str, Any]:
    rows = [
        (
            str(shot["shot"]),
            f"{found['linears']:,}",
            f"{found['iterations']:,}",
            f"{found['worst_residual']:.1e}",
            f"{found['not_converged']:,}",
        )
        for shot in inputs.results["shots"]
        if (found := shot["convergence"])
    ]
    if not rows:
        note = "No update needed an iterative solver: each was solved directly, or there was none."
        return {"solver_note": note, "solver_warning": "", "solvers": None, "unsolved": None}
    head = ("shot", "linears", "iterations", "worst residual", "not converged")
    left = [linear for linear in inputs.anatomy.linears if linear.converged is False]
    unsolved = [
        (f"{li.block}, {li.linear}", f"{li.iterations:,}", "" if li.residual is None else f"{li.residual:.1e}")
        for li in left
    ]
    note = (
        f"Updates of single weights are solved by conjugate gradients, to a residual of "
        f"{inputs.results['provenance']['parameters']['prune']['tolerance']:g} relative to the right-hand side."
    )
    last = inputs.results["shots"][-1]["convergence"]
    warning = f"{last['not_converged']} of {last['linears']} linears stopped before that in the last shot: raise "
    names = ("block, linear", "iterations", "residual")
    caption = "They stopped at prune.max_iterations; their weights are valid, but not the best for the curvature"
    return {
        "solver_note": note,
        "solver_warning": f"{warning}prune.max_iterations." if last["not_converged"] else "",
        "solvers": Table("Conjugate gradients of every shot", head, rows),
        "unsolved": Table(caption, names, unsolved) if unsolved else None,
    }
