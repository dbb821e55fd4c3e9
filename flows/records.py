"""Records of finished work: a stored result that names all others, so that one look-up finds the whole."""

from surgeon.store import Reference, Store
from tasks.context import ModelState


def named_results(store: Store, record: Reference, checkpoint_digest: str) -> dict[str, Reference] | None:
    """All results that a record names, by name; None if one is missing or the weights it ended with cannot be read.

    Args:
        store: where they are.
        record: its attributes hold "names" and "state".
        checkpoint_digest: of the dense model.
    """
    state = ModelState.from_json(checkpoint_digest, record.attributes["state"])
    if not all(store.has_payload(part.key) for part in state.stored):
        return None
    references = {name: store.lookup(key) for name, key in record.attributes["names"].items()}
    there = {name: reference for name, reference in references.items() if reference is not None}
    return there if len(there) == len(references) else None
