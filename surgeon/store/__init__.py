"""The store: results of the pipeline by key, as Zarr groups, committed whole or not at all."""

from surgeon.store.arrays import BFloat16Array, Layout, ReadArray, StorableArray
from surgeon.store.keys import SCHEMA, canonical_json, digest_arrays, digest_file, digest_text, stage_key
from surgeon.store.planned import PlannedStore, is_promised, promised_digest
from surgeon.store.reading import ArrayInfo, StoredObject
from surgeon.store.reference import Reference
from surgeon.store.store import Store
from surgeon.store.symmetric import SymmetricMatrix, pack_symmetric, unpack_symmetric
from surgeon.store.view import build_view

__all__ = [
    "SCHEMA",
    "ArrayInfo",
    "BFloat16Array",
    "Layout",
    "PlannedStore",
    "ReadArray",
    "Reference",
    "StorableArray",
    "Store",
    "StoredObject",
    "SymmetricMatrix",
    "build_view",
    "canonical_json",
    "digest_arrays",
    "digest_file",
    "digest_text",
    "is_promised",
    "pack_symmetric",
    "promised_digest",
    "stage_key",
    "unpack_symmetric",
]
