"""GGUF files to checkpoints: unpacks the quantised weights once into float32 safetensors."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from surgeon.errors import ModelError
from surgeon.models.hashes import file_sha256
from surgeon.models.quiet import quiet_transformers

RECORD_NAME = "surgeon-conversion.json"


def convert_gguf(gguf_file: Path, directory: Path) -> None:
    """Writes the model in a GGUF file as float32 safetensors with its tokenizer and generation configuration.

    Args:
        gguf_file: A local GGUF file of an architecture that transformers can read.
        directory: An existing directory to write into; see `surgeon.models.staging.build_directory`.

    Raises:
        ModelError: The file is not GGUF, or transformers cannot read its architecture or tokenizer.
    """
    check_gguf(gguf_file)
    folder, name = str(gguf_file.parent), gguf_file.name
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        except Exception as error:  # transformers raises many kinds here, and none of them names the file
            raise ModelError(
                f"transformers cannot read {gguf_file} ({type(error).__name__}: {error}). Give the model as a hub "
                "id or as a directory of safetensors instead."
            ) from error
        _check_unpacked(model, gguf_file)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    record = {"source": name, "sha256": file_sha256(gguf_file), "dtype": "float32"}
    (directory / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")


def check_gguf(path: Path) -> None:
    """Checks that a file exists and begins as a GGUF file does.

    Raises:
        ModelError: It does not.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"The GGUF file {path} cannot be opened ({error.strerror}).") from error
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'.")


def _check_unpacked(model: PreTrainedModel, gguf_file: Path) -> None:
    """Checks that nothing of the quantisation is left: packed weights would be saved as they are."""
    packed = [name for name, value in model.named_parameters() if not value.is_floating_point()]
    if packed or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"transformers did not unpack the weights of {gguf_file} ({len(packed)} are still packed). Give a "
            "directory of safetensors, or an unquantised GGUF file."
        )
