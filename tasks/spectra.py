"""Eigenvalues of the factors of one block, for people who look into a run; nothing is computed from them.

They are those of what was inverted: the factor over rows (columns) that lived before the shot and have any gradient
(activation), and with a bias the factor of the input `[a, 1]`. Damping is not in them: it only shifts them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.curvature.factors import LinearFactors
from surgeon.curvature.spec import Statistic
from surgeon.curvature.spectrum import Spectrum, spectrum_of
from surgeon.store import Reference, Store, StoredObject, StorePlace
from tasks.context import LinearShape, split_columns, split_rows
from tasks.stage import Outcome, Product, Request, Stage, produce

Array = NDArray[Any]
SPECTRA = Stage("spectra", 1, ("surgeon.curvature.spectrum", "tasks.spectra"))
SIDES = ("A", "G")
"""The factor of activations and that of gradients."""
HAVE_FACTORS = (Statistic.KRONECKER_TERMS, Statistic.INPUT_FACTORS, Statistic.OUTPUT_FACTORS)
"""Statistics that hold factors."""


@dataclass(frozen=True)
class SpectrumWork:
    """One block of one shot.

    Attributes:
        block: index.
        linears: all linears of the block, in module order.
        statistics: of the block, by kind; those without factors are not read.
        live: an object of the block with the live sets before the shot (its costs, or the update of the shot before);
            None where everything lived.
        label: of the shot.
    """

    block: int
    linears: tuple[LinearShape, ...]
    statistics: Mapping[Statistic, Reference]
    live: Reference | None
    label: str

    @property
    def factors(self) -> dict[Statistic, Reference]:
        """The statistics whose factors were inverted: the terms of a Kronecker sum, if there are any, else K-FAC's."""
        terms = self.statistics.get(Statistic.KRONECKER_TERMS)
        if terms is not None:
            return {Statistic.KRONECKER_TERMS: terms}
        return {s: ref for s, ref in self.statistics.items() if s in HAVE_FACTORS}


@dataclass(frozen=True)
class Here:
    """Eigenvalues come from this processor in float64, whatever made the factors."""

    store: StorePlace
    device: str = "cpu"
    arithmetic: str = "cpu"
    dtype: str = "float64"


def spectrum_request(work: SpectrumWork) -> Request:
    """The request for the eigenvalues of the factors of one block."""
    inputs = {statistic.value: reference.digest for statistic, reference in work.factors.items()}
    if work.live is not None:
        inputs["live"] = work.live.digest
    parameters = {"block": work.block, "linears": [asdict(linear) for linear in work.linears]}
    return Request(SPECTRA, parameters, inputs, f"{work.label}/block-{work.block:02d}/spectra")


def find_spectra(store: Store, work: SpectrumWork) -> Reference | None:
    """The eigenvalues of a block, if they were computed before; computes nothing."""
    return store.lookup(spectrum_request(work).key(Here(StorePlace(store.root))))


def spectrum_task(place: StorePlace, work: SpectrumWork) -> Outcome[Reference]:
    """Eigenvalues of the factors of one block's linears; a rerun finds them, also where the factors were dropped.

    Arrays are `<linear>/A` and `<linear>/G`, ascending float64. The attribute "linears" says by linear and side which
    array is its own (linears that read the same input share one), with condition number and effective rank.

    Raises:
        EvictedError: if they have to be computed and the factors were dropped.
    """
    return produce(Here(place), spectrum_request(work), lambda: _compute(place.open(), work))


def read_spectra(store: Store, reference: Reference) -> dict[str, dict[str, Spectrum]]:
    """Eigenvalues by linear and side ("A", "G"); a linear without measured factors is not there."""
    stored = store.open(reference.key)
    return {
        linear: {side: Spectrum(stored.array(facts["array"])) for side, facts in sides.items()}
        for linear, sides in reference.attributes["linears"].items()
    }


def _compute(store: Store, work: SpectrumWork) -> Product:
    arrays: dict[str, Array] = {}
    known: dict[tuple[str, bytes], str] = {}
    facts: dict[str, dict[str, Any]] = {}
    stored = {statistic: store.open(reference.key) for statistic, reference in work.factors.items()}
    sets = _live_sets(store, work)
    for shape in work.linears:
        for side, source, matrix in _factors(stored, shape):
            live = _live(matrix, sets[shape.name][side])
            # Linears with one input share its factor, and mostly what lives of it.
            place = known.setdefault((source, live.tobytes()), f"{shape.name}/{side}")
            if place not in arrays:
                arrays[place] = spectrum_of(matrix[live][:, live]).values
            spectrum = Spectrum(arrays[place])
            facts.setdefault(shape.name, {})[side] = {
                "array": place,
                "condition": spectrum.condition(),
                "effective_rank": spectrum.effective_rank(),
                "mean_diagonal": spectrum.mean_diagonal,
            }
    return Product(arrays, {"linears": facts})


def _factors(stored: Mapping[Statistic, StoredObject], shape: LinearShape) -> Iterator[tuple[str, str, Array]]:
    """Side, name of the array and matrix of each factor of a linear that was measured."""
    if terms := stored.get(Statistic.KRONECKER_TERMS):
        for side in SIDES:
            if (name := f"{shape.name}/{side}") in terms:
                yield side, name, terms.array(name)[0]
        return
    if (inputs := stored.get(Statistic.INPUT_FACTORS)) and (source := inputs.attributes["reads"].get(shape.name)):
        yield "A", f"{source}/A", _activations(inputs, source, shape.has_bias)
    if (outputs := stored.get(Statistic.OUTPUT_FACTORS)) and (name := f"{shape.name}/G") in outputs:
        yield "G", name, outputs.array(name)


def _activations(inputs: StoredObject, source: str, has_bias: bool) -> Array:
    activations = torch.from_numpy(inputs.array(f"{source}/A"))
    if not has_bias:
        return activations.numpy()
    mean = torch.from_numpy(inputs.array(f"{source}/mean_input"))
    return LinearFactors(activations=activations, mean_input=mean).augmented_activations().numpy()


def _live_sets(store: Store, work: SpectrumWork) -> dict[str, dict[str, Array]]:
    """What lived before the shot, by linear and side."""
    if work.live is None:
        return {s.name: {"A": np.ones(s.n_in, np.bool_), "G": np.ones(s.n_out, np.bool_)} for s in work.linears}
    stored = store.open(work.live.key)
    rows = split_rows(work.linears, stored.array("live_rows"))
    columns = split_columns(work.linears, stored.array("live_columns"))
    return {s.name: {"A": c, "G": r} for s, r, c in zip(work.linears, rows, columns, strict=True)}


def _live(matrix: Array, before: Array) -> Array:
    """What of a factor was inverted: live and not zero, and the bias, which is the last of a factor that has it."""
    live = np.ones(len(matrix), np.bool_)
    live[: before.size] = before & (matrix.diagonal()[: before.size] != 0)
    return live
