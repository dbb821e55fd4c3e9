"""Writes the page of a finished run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.anatomy import read_anatomy
from flows.report.inputs import IRRELEVANT, ReportInputs
from flows.session import Session
from flows.spectra import spectrum_works
from flows.workspace import write_bytes
from surgeon.store import Reference, canonical_json, digest_file, digest_text
from tasks.spectra import find_spectra, read_spectra


def write_report(
    session: Session,
    results: Mapping[str, Any],
    references: Mapping[str, Reference],
    timings: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes `data/report/index.html`, unless nothing was executed and the page shows these results already.

    Args:
        session: of the run.
        results: as in `run.json`.
        references: of the manifest, by readable name.
        timings: how each stage last went, by stage.
    """
    content = _content(session, results)
    if not results["tasks"]["executed"] and _content_of(session.workspace.report) == content:
        return
    # Half a second of imports, which no other command needs.
    from flows.report.page import render_page

    write_bytes(session.workspace.report, render_page(read_inputs(session, results, references, timings)).encode())


def read_inputs(
    session: Session,
    results: Mapping[str, Any],
    references: Mapping[str, Reference],
    timings: Mapping[str, Mapping[str, Any]],
) -> ReportInputs:
    """What the page is made from, read from the store; computes nothing."""
    store, shots = session.store, len(results["shots"])
    works = spectrum_works(references, shots, session.model.blocks)
    found = {work.block: find_spectra(store, work) for work in works}
    return ReportInputs(
        results=results,
        anatomy=read_anatomy(store, references, shots),
        params=session.params,
        spectra={
            block: read_spectra(store, reference)
            for block, reference in found.items()
            if reference is not None and store.has_payload(reference.key)
        },
        no_spectra=_DROPPED if works else _NO_FACTORS,
        timings=timings,
        content=_content(session, results),
    )


_DROPPED = (
    "The factors of the last shot are not in the store any more (run.keep drops them), so their spectra are not known. "
    "With run.keep=last they stay."
)
_NO_FACTORS = "This curvature is not made of factors, so there are no spectra."
_VOLATILE = ("elapsed_s", "peak_memory_gib", "tasks")
"""How the last run went: of one that executed nothing there is nothing to show."""
_HEAD_BYTES = 4096


def _content(session: Session, results: Mapping[str, Any]) -> str:
    """Digest of what the page is made from: results, parameters, and the code of the page."""
    shown = {name: value for name, value in results.items() if name not in _VOLATILE}
    params = session.params.model_dump(mode="json", exclude={"run": set(IRRELEVANT)})
    own = {path.name: digest_file(path) for path in Path(__file__).parent.iterdir() if path.is_file()}
    plain = json.loads(json.dumps(shown))  # numbers of a kind of their own, such as sizes, are numbers
    return digest_text(canonical_json({"results": plain, "params": params, "code": own}))


def _content_of(page: Path) -> str | None:
    """The digest in a page; None if there is no page."""
    if not page.is_file():
        return None
    with page.open(encoding="utf-8") as file:
        found = re.search('<meta name="content-digest" content="([0-9a-f]{64})">', file.read(_HEAD_BYTES))
    return found and found[1]
