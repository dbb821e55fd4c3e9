"""Writing pruned models as checkpoints that are smaller by what was removed, and loading them back."""

from surgeon.export.directory import Exported, export_checkpoint, is_exported, is_intact, read_record
from surgeon.export.facts import CARD_FACTS, describe
from surgeon.export.load_back import Probe, expected_logits, require_loads_back
from surgeon.export.plan import ExportPlan, PrunedModel, plan_export

__all__ = [
    "CARD_FACTS",
    "ExportPlan",
    "Exported",
    "Probe",
    "PrunedModel",
    "describe",
    "expected_logits",
    "export_checkpoint",
    "is_exported",
    "is_intact",
    "plan_export",
    "read_record",
    "require_loads_back",
]
