"""The objects of a run or of a store, and what they take on the disk."""

from collections import defaultdict
from typing import Any

from flows.inspection.opening import open_store, read_manifest
from flows.workspace import Workspace


def list_objects(workspace: Workspace, whole_store: bool) -> list[dict[str, Any]]:
    """Objects of the last run (by its manifest), or of the whole store."""
    store = open_store(workspace)
    if whole_store:
        named = [(reference.label or reference.key, reference) for reference in store.entries()]
    else:
        named = list(read_manifest(workspace).items())
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
        for name, ref in sorted(named, key=lambda pair: (pair[0], pair[1].key))
    ]


def bytes_by_kind(objects: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Number of objects and bytes of each kind, most bytes first; equal objects count once."""
    found: dict[str, list[int]] = defaultdict(list)
    for one in {one["key"]: one for one in objects}.values():
        found[one["kind"]].append(one["bytes"])
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in sorted(found.items(), key=lambda item: -sum(item[1]))}
