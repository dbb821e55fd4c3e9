"""Writing a pruned model as a Hugging Face directory.

The files of the dense checkpoint are rewritten one at a time, and each tensor by tensor, so shards, names and ties stay
as they were and memory is bounded by a block. The directory appears in one step.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from surgeon.export.facts import CARD_FACTS, describe, export_facts
from surgeon.export.plan import ExportPlan
from surgeon.export.safetensors_stream import write_safetensors
from surgeon.export.tensors import ExportTensors
from surgeon.models import compact
from surgeon.models.checkpoint import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from surgeon.store import digest_file
from surgeon.store.files import is_stale, temporary_name

RECORD_NAME = "surgeon.json"
CARD_NAME = "README.md"
_NOT_COPIED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".safetensors", ".gguf", ".msgpack", ".h5", ".onnx")
_NAMES_NOT_COPIED = (RECORD_NAME, INDEX_NAME, compact.MODELLING_NAME)
"""What is written anew: a source that is itself an export has files of these names."""


@dataclass(frozen=True)
class Exported:
    """What was written: SHA-256 of every file by name, and facts of the export."""

    files: dict[str, str]
    facts: dict[str, Any]


def export_checkpoint(
    plan: ExportPlan,
    destination: Path,
    card: str,
    record: Mapping[str, Any],
    check: Callable[[Path], float] | None = None,
) -> Exported:
    """Writes the checkpoint and puts it in place of what was at the destination before.

    Args:
        plan: what to write.
        destination: directory; what it held is replaced in one step.
        card: text of the model card (Markdown); `CARD_FACTS` in it becomes the description of the export.
        record: facts that identify the export; kept in the directory as JSON.
        check: looks at the directory before it is put in place and returns the largest difference of a logit; if it
            raises, the destination stays as it was.

    Raises:
        ExportError: if a pruned tensor is not one of the checkpoint.
    """
    _clear_up(destination)
    temporary = destination.with_name(temporary_name(f".{destination.name}.new"))
    temporary.mkdir(parents=True)
    try:
        exported = _write(plan, temporary, card, record, check)
        _swap(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return exported


def _write(
    plan: ExportPlan,
    directory: Path,
    card: str,
    record: Mapping[str, Any],
    check: Callable[[Path], float] | None,
) -> Exported:
    for file in sorted(plan.pruned.checkpoint.path.iterdir()):
        is_wanted = not file.name.startswith(".") and file.suffix not in _NOT_COPIED
        if file.is_file() and is_wanted and file.name not in _NAMES_NOT_COPIED:
            shutil.copyfile(file, directory / file.name)
    _write_text(directory / CONFIG_NAME, json.dumps(plan.config, indent=2) + "\n")
    if str(plan.config.get("model_type", "")).startswith(compact.PREFIX):
        shutil.copyfile(str(compact.__file__), directory / compact.MODELLING_NAME)
    facts = _write_weights(plan, directory)
    facts["largest_logit_difference"] = check(directory) if check is not None else 0.0
    _write_text(directory / CARD_NAME, card.replace(CARD_FACTS, describe(facts)))
    files = {file.name: digest_file(file) for file in sorted(directory.iterdir())}
    content = {**record, "facts": facts, "files": files}
    content["digest"] = _digest(content)
    _write_text(directory / RECORD_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return Exported(files, facts)


def _write_weights(plan: ExportPlan, directory: Path) -> dict[str, Any]:
    tensors = ExportTensors(plan)
    weight_map: dict[str, str] = {}
    total = 0
    for file, plans in tensors.files():
        if not plans:  # all of it is gone
            continue
        total += write_safetensors(directory / file.name, plans)
        weight_map |= dict.fromkeys(plans, file.name)
    index_file = plan.pruned.checkpoint.path / INDEX_NAME
    if index_file.is_file() and WEIGHTS_NAME not in weight_map.values():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        index["weight_map"] = dict(sorted(weight_map.items()))
        _write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return export_facts(plan, tensors.tally, total)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of an export with its facts and files; None if the directory has none that can be read."""
    try:
        found = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        return None
    # Exports of earlier versions have no digest of the record itself.
    return found if "digest" not in found or found["digest"] == _digest(found) else None


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in content.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_exported(destination: Path, record: Mapping[str, Any]) -> bool:
    """Whether a directory holds this export, all files as they were written and no other weights."""
    found = read_record(destination)
    if found is None or "digest" not in found or not is_intact(destination, found):
        return False
    identity = {name: value for name, value in found.items() if name not in ("files", "facts", "digest")}
    return bool(identity == json.loads(json.dumps(record)))


def is_intact(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether all files of an export are as they were written, and it has no other weights or code."""
    files: dict[str, str] = record["files"]
    # Weights and code of another name can be the ones that are loaded.
    if not {file.name for kind in ("*.safetensors", "*.py") for file in directory.glob(kind)} <= files.keys():
        return False
    return all((directory / n).is_file() and _digest_of(directory / n) == sha for n, sha in files.items())


def _digest_of(path: Path) -> str:
    status = path.stat()
    return _digest_once(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=64)
def _digest_once(path: Path, *_state: int) -> str:
    """A run asks several times whether the export is as it was written; its files are read once."""
    return digest_file(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _swap(temporary: Path, destination: Path) -> None:
    old = destination.with_name(temporary_name(f".{destination.name}.old"))
    if destination.exists():
        destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        if old.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_up(destination: Path) -> None:
    """Removes what exports that were killed left beside a destination; one killed while swapping is undone."""
    new, old = f".{destination.name}.new", f".{destination.name}.old"
    for path in sorted(destination.parent.glob(".*")):
        prefix = path.name.rsplit("-", 2)[0]
        if prefix not in (new, old) or not is_stale(path.name):
            continue
        if prefix == old and not destination.exists():
            path.rename(destination)
        else:
            shutil.rmtree(path, ignore_errors=True)
