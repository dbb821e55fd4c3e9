"""Loading an export into memory, by the classes of this package and those of transformers alone."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgeon.errors import ExportError
from surgeon.export.directory import RECORD_NAME, read_record
from surgeon.models.checkpoint import CONFIG_NAME
from surgeon.models.compact_classes import compact_classes, is_compact
from surgeon.models.quiet import quiet_transformers
from surgeon.store import digest_file


def load(
    directory: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Loads a model that Surgeon exported, in whichever form; no Python file of the directory is run.

    Args:
        directory: the export.
        dtype: of the parameters; None is that of the files.
        device: where to put it; None is the CPU.

    Returns:
        The model in evaluation mode.

    Raises:
        ExportError: the directory is not an export, or its configuration is not as it was written.
    """
    path = Path(directory)
    record = read_record(path)
    other = (
        "For another model use transformers: AutoModelForCausalLM.from_pretrained(directory), with "
        "trust_remote_code=True if you trust the Python files in it"
    )
    if record is None:
        raise ExportError(f"{path} is not an export of Surgeon: it has no readable {RECORD_NAME}. {other}.")
    expected = record["files"].get(CONFIG_NAME)
    if not (path / CONFIG_NAME).is_file() or digest_file(path / CONFIG_NAME) != expected:
        raise ExportError(
            f"{path / CONFIG_NAME} is not the file that was exported, so it may not describe these weights. Export "
            f"again, or fetch the directory again. {other}."
        )
    facts = record.get("facts") or {}
    if facts.get("trust_remote_code") and not is_compact(path):
        raise ExportError(
            f"{path} is built by Python files of the model it was made from, which are not run here. {other}."
        )
    with quiet_transformers():
        if is_compact(path):
            config_class, model_class = compact_classes(path)
            config = config_class.from_pretrained(path)
            model: PreTrainedModel = model_class.from_pretrained(
                path, config=config, dtype=dtype or "auto", local_files_only=True
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    model.train(mode=False)
    return model


def load_checkpoint(
    directory: Path, dtype: torch.dtype, device: str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a checkpoint: an export of Surgeon in its own way, anything else with stock transformers.

    Args:
        directory: of safetensors and a configuration.
        dtype: of the parameters.
        device: where to put it.
        trust_remote_code: whether the Python files of the directory may be run; then transformers loads exports too.

    Returns:
        The model in evaluation mode; its parameters need no gradient.
    """
    if not trust_remote_code and (directory / RECORD_NAME).is_file():
        model = load(directory, dtype=dtype, device=device)
    else:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code
            )
        torch.nn.Module.to(model, device)
    model.train(mode=False)
    model.requires_grad_(False)
    return model
