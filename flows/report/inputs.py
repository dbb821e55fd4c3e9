"""What the page is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.anatomy import Anatomy
from flows.params import Params
from surgeon.curvature.spectrum import Spectrum

BlockSpectra = Mapping[str, Mapping[str, Spectrum]]
"""Eigenvalues of one block, by linear and side ("A", "G")."""


IRRELEVANT = ("engine", "blocks_per_group", "memory_gib", "store")
"""Parameters of `run` that change nothing that is found."""


@dataclass(frozen=True)
class ReportInputs:
    """Everything that is on the page comes from here; the same inputs give the same bytes.

    Attributes:
        results: of `run.json`.
        anatomy: what the run did to each linear.
        params: all parameters of the run.
        spectra: of some blocks of the last shot, by block.
        no_spectra: why there are none.
        timings: how each stage last went, by stage (`data/timings`).
        content: digest of all that the page shows but times; it is in the page, which need not be made again then.
    """

    results: Mapping[str, Any]
    anatomy: Anatomy
    params: Params
    spectra: Mapping[int, BlockSpectra] = field(default_factory=dict)
    no_spectra: str = ""
    timings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    content: str = ""
