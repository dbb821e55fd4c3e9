"""Writing a pruned model as a Hugging Face directory that stock transformers loads.

The files of the dense checkpoint are rewritten one at a time with pruned tensors in place of their own, so names,
shards and ties stay as they were and memory is bounded by a file. The directory appears in one step.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from surgeon.errors import ExportError
from surgeon.models import Checkpoint, WeightFiles
from surgeon.models.checkpoint import CONFIG_NAME, INDEX_NAME, find_weight_files
from surgeon.models.quiet import quiet_transformers
from surgeon.passes.blockwise import Overrides
from surgeon.store import digest_file
from surgeon.store.files import is_stale, temporary_name

RECORD_NAME = "surgeon.json"
CARD_NAME = "README.md"
_NOT_COPIED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".safetensors", ".gguf", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class ExportPlan:
    """What is to be written.

    Attributes:
        checkpoint: the dense model.
        replaced: full name of each pruned tensor → index of its block.
        overrides: pruned tensors by block and full name.
        dtype: of all float tensors, "float32", "bfloat16" or "float16".
        card: text of the model card (Markdown).
        record: facts that identify the model; kept in the directory as JSON.
    """

    checkpoint: Checkpoint
    replaced: Mapping[str, int]
    overrides: Overrides
    dtype: str
    card: str
    record: Mapping[str, Any]


def export_checkpoint(
    plan: ExportPlan, destination: Path, check: Callable[[Path], object] | None = None
) -> dict[str, str]:
    """Writes the checkpoint and puts it in place of what was at the destination before.

    Args:
        plan: what to write.
        destination: directory; what it held is replaced in one step.
        check: looks at the finished directory before it is put in place; if it raises, the destination stays as it was.

    Returns:
        SHA-256 of every file written, by name.

    Raises:
        ExportError: if a pruned tensor is not one of the checkpoint.
    """
    _clear_up(destination)
    temporary = destination.with_name(temporary_name(f".{destination.name}.new"))
    temporary.mkdir(parents=True)
    try:
        files = _write(plan, temporary)
        if check is not None:
            check(temporary)
        _swap(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return files


def _write(plan: ExportPlan, directory: Path) -> dict[str, str]:
    source = plan.checkpoint.path
    for file in sorted(source.iterdir()):
        # A source that is itself an export has a record, which is not one of this export.
        is_wanted = not file.name.startswith(".") and file.suffix not in _NOT_COPIED and file.name != RECORD_NAME
        if file.is_file() and is_wanted:
            shutil.copyfile(file, directory / file.name)
    config = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = plan.dtype
    _write_text(directory / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    _write_weights(plan, directory)
    _write_text(directory / CARD_NAME, plan.card)
    files = {file.name: digest_file(file) for file in sorted(directory.iterdir())}
    _write_text(directory / RECORD_NAME, json.dumps({**plan.record, "files": files}, indent=2, sort_keys=True) + "\n")
    return files


def is_exported(destination: Path, record: Mapping[str, Any]) -> bool:
    """Whether a directory holds this export, all files as they were written and no other weights."""
    try:
        found = json.loads((destination / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = found.pop("files", None) if isinstance(found, dict) else None
    if not isinstance(files, dict) or found != json.loads(json.dumps(record)):
        return False
    # Weights of another name can be the ones that are loaded.
    if not {file.name for file in destination.glob("*.safetensors")} <= files.keys():
        return False
    return all((destination / n).is_file() and digest_file(destination / n) == sha for n, sha in files.items())


def require_loads_back(
    directory: Path, input_ids: Tensor, expected: Tensor, dtype: torch.dtype, trust_remote_code: bool = False
) -> float:
    """Loads an exported checkpoint with stock transformers and compares logits.

    Args:
        directory: the export.
        input_ids: `[n_sequences, length]`.
        expected: logits of the pruned model in memory, `[n_sequences, length, n_vocabulary]`.
        dtype: to load with: the one ``expected`` was computed in.
        trust_remote_code: whether model code that comes with the checkpoint may run.

    Returns:
        Largest difference of a logit, relative to the largest logit.

    Raises:
        ExportError: if they differ by more than rounding.
    """
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code
        )
        logits = model(input_ids).logits
    difference = float((logits - expected.cpu()).abs().max() / expected.abs().max())
    limit = 1e-4 if dtype is torch.float32 else 5e-2
    if not difference <= limit:
        raise ExportError(
            f"{directory} loads in transformers but gives other logits than the pruned model in memory: relative "
            f"difference {difference:.2e}, allowed {limit:g}. Nothing should rely on this export; please report it."
        )
    return difference


def _write_weights(plan: ExportPlan, directory: Path) -> None:
    weights = WeightFiles(plan.checkpoint)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    cache: dict[int, Mapping[str, Tensor]] = {}
    blocks: dict[str, tuple[int, str]] = {}
    for name, block in plan.replaced.items():
        stored = weights.stored_name(name)
        if stored is None:
            raise ExportError(f"{plan.checkpoint.path} has no tensor {name!r} to be replaced; nothing was exported")
        blocks[stored] = (block, name)
    total = 0
    for file in find_weight_files(plan.checkpoint.path):
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118 (not a dict: it cannot be iterated over)
                tensor = opened.get_tensor(stored)
                if stored in blocks:
                    index, name = blocks[stored]
                    if index not in cache:
                        cache = {index: plan.overrides(index)}
                    tensor = cache[index][name]
                tensors[stored] = tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    index_file = plan.checkpoint.path / INDEX_NAME
    if index_file.is_file():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        _write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")


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
