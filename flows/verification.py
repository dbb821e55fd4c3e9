"""`surgeon verify`: reads everything in the store, and finds what is damaged before it is needed."""

from typing import Any

from flows.inspection.opening import open_store
from flows.workspace import Workspace
from surgeon.errors import CorruptObjectError
from tasks.progress import report


def verify_store(workspace: Workspace) -> dict[str, Any]:
    """Reads all objects and compares digests. Damaged ones are moved aside by the store.

    Returns:
        `verified` and `evicted` (whose references alone are there): numbers of objects; `bytes` that were read;
        `damaged`: what was found, one line each.

    Raises:
        InputError: there is no store.
    """
    store = open_store(workspace)
    keys = list(store.all_keys())
    n_bytes = verified = evicted = 0
    damaged = []
    for number, key in enumerate(keys):
        report("verify", number, len(keys))
        try:
            if store.lookup(key, label="") is None:
                continue  # removed meanwhile
            if not store.has_payload(key):
                evicted += 1
                continue
            store.verify(key)
            n_bytes += store.size_bytes(key)
            verified += 1
        except CorruptObjectError as error:
            damaged.append(str(error))
    return {"verified": verified, "evicted": evicted, "bytes": n_bytes, "damaged": damaged}
