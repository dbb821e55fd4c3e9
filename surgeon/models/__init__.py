"""Models: where they come from, how they are built, and reading their weights a block at a time."""

from surgeon.models.architecture import Architecture, BlockCouplings, discover
from surgeon.models.builtin import BUILTIN_NAME
from surgeon.models.checkpoint import Checkpoint
from surgeon.models.families import AttentionCoupling, Family, MlpCoupling, QkvLayout, find_family
from surgeon.models.sharing import shared_inputs
from surgeon.models.skeleton import build_skeleton, count_parameters, load_into, load_trunk, unload
from surgeon.models.sources import resolve_model
from surgeon.models.weights import WeightFiles

__all__ = [
    "BUILTIN_NAME",
    "Architecture",
    "AttentionCoupling",
    "BlockCouplings",
    "Checkpoint",
    "Family",
    "MlpCoupling",
    "QkvLayout",
    "WeightFiles",
    "build_skeleton",
    "count_parameters",
    "discover",
    "find_family",
    "load_into",
    "load_trunk",
    "resolve_model",
    "shared_inputs",
    "unload",
]
