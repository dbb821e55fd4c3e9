"""The store: results of the pipeline by key, as Zarr groups, committed whole or not at all."""

from surgeon.store.arrays import BFloat16Array, Layout, ReadArray, StorableArray
from surgeon.store.intake import take_in
from surgeon.store.keys import SCHEMA, canonical_json, digest_arrays, digest_file, digest_text, stage_key
from surgeon.store.place import CACHE_VARIABLE, StorePlace, is_url
from surgeon.store.planned import PlannedStore, is_promised, promised_digest
from surgeon.store.reading import ArrayInfo, StoredObject
from surgeon.store.reference import Reference
from surgeon.store.roots import forget, register, registered
from surgeon.store.store import Store
from surgeon.store.sweep import Entry, Size, size_of, survey, sweep
from surgeon.store.symmetric import SymmetricMatrix, pack_symmetric, unpack_symmetric
from surgeon.store.users import Presence, alone, live_users
from surgeon.store.view import build_view

__all__ = [
    "CACHE_VARIABLE",
    "SCHEMA",
    "ArrayInfo",
    "BFloat16Array",
    "Entry",
    "Layout",
    "PlannedStore",
    "Presence",
    "ReadArray",
    "Reference",
    "Size",
    "StorableArray",
    "Store",
    "StorePlace",
    "StoredObject",
    "SymmetricMatrix",
    "alone",
    "build_view",
    "canonical_json",
    "digest_arrays",
    "digest_file",
    "digest_text",
    "forget",
    "is_promised",
    "is_url",
    "live_users",
    "pack_symmetric",
    "promised_digest",
    "register",
    "registered",
    "size_of",
    "stage_key",
    "survey",
    "sweep",
    "take_in",
    "unpack_symmetric",
]
