"""Looking into a store without computing anything of the pipeline."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.restoring import refill
from flows.workspace import Workspace, read_json
from surgeon.errors import InputError
from surgeon.store import Reference, Store


def list_objects(workspace: Workspace, whole_store: bool) -> list[dict[str, Any]]:
    """Objects of the last run (by its manifest), or of the whole store."""
    store = _open_store(workspace)
    named = {r.label or r.key: r for r in store.entries()} if whole_store else _manifest(workspace)
    return [
        {
            "name": name,
            "kind": ref.kind,
            "arrays": dict(ref.arrays),
            "digest": ref.digest,
            "key": ref.key,
            "payload": store.has_payload(ref.key),
            "bytes": store.size_bytes(ref.key),
        }
        for name, ref in sorted(named.items())
    ]


def inspect_block(workspace: Workspace, block: int, shot: int | None) -> list[dict[str, Any]]:
    """Shape, live size, condition numbers and effective ranks of the factors of one block's linears.

    The condition number is that of the undamped factor (largest over smallest eigenvalue); the effective rank is the
    exponential of the entropy of the normalised spectrum.
    """
    store, manifest = _open_store(workspace), _manifest(workspace)
    suffix = f"/block-{block:02d}/input-factors"
    names = [n for n in sorted(manifest) if n.endswith(suffix) and (shot is None or n.startswith(f"shot-{shot:02d}/"))]
    names = [n for n in names if store.has_payload(manifest[n].key)]
    if not names:
        which = f"of shot {shot}" if shot else "of any shot"
        raise InputError(
            f"the factors of block {block} {which} are not in the store (run.keep drops those of earlier shots, and "
            "`surgeon inspect` lists what is there); choose another block or shot, or run with -S run.keep=all"
        )
    place = names[-1].removesuffix("/input-factors")
    inputs = store.open(manifest[names[-1]].key)
    outputs = store.open(manifest[f"{place}/output-factors"].key) if f"{place}/output-factors" in manifest else None
    update = store.open(manifest[f"{place}/update"].key)
    spectra: dict[str, NDArray[np.float64]] = {}
    rows = []
    at_row = at_column = 0  # vectors over the rows (columns) of all linears follow each other
    reads = inputs.attributes["reads"]
    for linear in update.attributes["order"]:
        source = reads[linear]
        for factors, name in ((inputs, f"{source}/A"), (outputs, f"{linear}/G")):
            if factors is not None and name not in spectra:
                spectra[name] = np.linalg.eigvalsh(factors.array(name).astype(np.float64))
        n_out, n_in = update.array_info(f"{linear}/weight").shape
        live = (
            int(update.array("live_rows")[at_row : at_row + n_out].sum()),
            int(update.array("live_columns")[at_column : at_column + n_in].sum()),
        )
        at_row, at_column = at_row + n_out, at_column + n_in
        a, g = spectra[f"{source}/A"], spectra.get(f"{linear}/G")
        rows.append(
            {
                "linear": linear,
                "shape": [n_out, n_in],
                "live": list(live),
                "condition_A": _condition(a),
                "condition_G": None if g is None else _condition(g),
                "effective_rank_A": _effective_rank(a),
                "effective_rank_G": None if g is None else _effective_rank(g),
                "reads": source,
            }
        )
    return rows


def _condition(spectrum: NDArray[np.float64]) -> float:
    """Largest over smallest eigenvalue; below rounding of float32 the smallest counts as that rounding."""
    largest = float(spectrum[-1])
    return largest / max(float(spectrum[0]), largest * float(np.finfo(np.float32).eps)) if largest > 0 else 1.0


def _effective_rank(spectrum: NDArray[np.float64]) -> float:
    p = np.clip(spectrum, 0, None)
    if p.sum() == 0:
        return 0.0
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _open_store(workspace: Workspace) -> Store:
    refill(workspace)
    if not workspace.store.is_dir():
        raise InputError(f"there is no store at {workspace.store} yet; `surgeon run` makes one")
    return Store(workspace.store)


def _manifest(workspace: Workspace) -> dict[str, Reference]:
    found = read_json(workspace.manifest)
    if found is None:
        raise InputError(f"{workspace.manifest} is missing: no run has finished here yet; try --store")
    return {name: Reference.from_json(value) for name, value in found.items()}
