"""Puts the page together: one HTML file that needs nothing else, no network and no script."""

import json
from dataclasses import replace
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flows.report.allocation import allocation_section, update_section
from flows.report.block_map import STEPS
from flows.report.curvature import curvature_section
from flows.report.inputs import ReportInputs
from flows.report.overview import headline, result_section, tiles
from flows.report.provenance import provenance_section
from flows.report.recovery import recovery_section
from flows.report.shots import shot_section
from flows.report.timing import time_section
from surgeon.choices import UpdateRule

_SECTIONS = (
    ("result", "Result"),
    ("shots", "Shots"),
    ("recovery", "Recovery"),
    ("where", "Where"),
    ("updates", "Updates"),
    ("curvature", "Curvature"),
    ("time", "Time"),
    ("samples", "Samples"),
    ("provenance", "Provenance"),
)
_TURN = 7
"""Step of the colour scales from which text on them is in the other colour."""


def render_page(inputs: ReportInputs) -> str:
    """The page as text; the same inputs give the same text."""
    # One order of all names, whether they come from a run or were read back.
    inputs = replace(inputs, results=json.loads(json.dumps(inputs.results, sort_keys=True)))
    results = inputs.results
    recovery = recovery_section(results)
    page: dict[str, Any] = {
        "content": inputs.content,
        **headline(results),
        "tiles": tiles(results),
        "sections": [section for section in _SECTIONS if section[0] != "recovery" or recovery],
        "recovery": recovery,
        **result_section(results),
        **shot_section(results),
        **allocation_section(results, inputs.anatomy),
        **update_section(
            inputs.anatomy, UpdateRule(results["provenance"]["parameters"]["prune"]["update"] or UpdateRule.NONE)
        ),
        **curvature_section(inputs),
        **time_section(results, inputs.timings),
        "samples": [(name, results["samples"][name]) for name in ("dense", "pruned")],
        **provenance_section(inputs),
    }
    environment = Environment(
        loader=PackageLoader("flows.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = Markup(resources.files("flows.report").joinpath("style.css").read_text(encoding="utf-8"))
    template = environment.get_template("page.html.j2")
    return template.render(page=page, style=style, steps=STEPS, turn=_TURN)
