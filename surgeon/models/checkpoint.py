"""A checkpoint on disk: which files it consists of, whether they can be read, and the digest of their contents."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from surgeon.errors import ModelError
from surgeon.models.hashes import FileHashes

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A local directory with safetensors weights, `config.json` and a tokenizer.

    Attributes:
        path: The directory.
        source: What the user asked for: a built-in name, a path or a hub id.
        revision: Which version of the source it is: a hub commit, a package version, a file hash, or `local`.
        digest: SHA-256 in hexadecimal of the weights, the configuration and the tokenizer.
        trust_remote_code: Whether the Python files in the directory may be run. Off unless the user turned it on.
    """

    path: Path
    source: str
    revision: str
    digest: str
    trust_remote_code: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored and its shape, read from a safetensors header."""

    file: Path
    shape: tuple[int, ...]


def open_checkpoint(
    path: Path, source: str, revision: str, hashes: FileHashes, *, trust_remote_code: bool = False
) -> Checkpoint:
    """Checks a directory without loading weights, and computes its digest.

    Args:
        path: Directory of the checkpoint; nothing is written into it.
        source: What the user asked for.
        revision: Which version of the source this is.
        hashes: Memory of file hashes.
        trust_remote_code: Whether the Python files in the directory may be run; if so they are part of the digest.

    Returns:
        The checkpoint.

    Raises:
        ModelError: A file is missing, cannot be read, or is of a kind that is not supported.
    """
    path = path.absolute()
    config = _read_json(path / CONFIG_NAME, f"{path} is not a model directory")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        raise ModelError(
            f"{path / CONFIG_NAME} describes quantised weights (method {method!r}), and only float weights can be "
            "pruned. Give the checkpoint it was quantised from."
        )
    weight_files = find_weight_files(path)
    read_headers(path)
    files = {*weight_files, path / CONFIG_NAME, *_matching(path, TOKENIZER_PATTERNS)}
    if len(files) == len(weight_files) + 1:
        raise ModelError(
            f"{path} has no tokenizer (none of {', '.join(TOKENIZER_PATTERNS)}). Save one there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(directory)."
        )
    if trust_remote_code:
        files |= set(_matching(path, ("*.py",)))
    entries = sorted((file.name, hashes.sha256(file)) for file in files)
    hashes.save()
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return Checkpoint(path, source, revision, digest, trust_remote_code)


def find_weight_files(path: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint directory, as `model.safetensors` or its index names them.

    Raises:
        ModelError: There are none, a shard named by the index is missing, or there is only another format.
    """
    if (path / WEIGHTS_NAME).is_file():
        return [path / WEIGHTS_NAME]
    if (path / INDEX_NAME).is_file():
        shards = sorted(set(_weight_map(path).values()))
        for shard in shards:
            if not (path / shard).is_file():
                raise ModelError(
                    f"{path / shard} is missing: {INDEX_NAME} names {len(shards)} files and this one is not there. "
                    "Fetch the checkpoint again."
                )
        return [path / shard for shard in shards]
    raise ModelError(_no_weights_message(path))


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Opens the header of every weight file of a checkpoint directory.

    Returns:
        Name of each stored tensor → its file and shape.

    Raises:
        ModelError: A file is truncated, is not safetensors, or lacks a tensor that the index promises.
    """
    headers = {file: _read_header(file) for file in find_weight_files(path)}
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    if not (path / WEIGHTS_NAME).is_file():
        for name, shard in _weight_map(path).items():
            if name not in headers[path / shard]:
                raise ModelError(
                    f"{path / shard} does not hold the tensor {name!r} that {INDEX_NAME} says it holds. "
                    "The files are of different versions; fetch the checkpoint again."
                )
            tensors[name] = headers[path / shard][name]
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return {name: StoredTensor(file, tuple(opened.get_slice(name).get_shape())) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{file} cannot be read as safetensors ({error}). It is damaged or incomplete; fetch or save it again."
        ) from error


def read_model_type(path: Path) -> str:
    """Returns `model_type` of the `config.json` in a checkpoint directory; empty if it has none.

    Raises:
        ModelError: There is no readable `config.json`.
    """
    return str(_read_json(path / CONFIG_NAME, f"{path} is not a model directory").get("model_type", ""))


def _weight_map(path: Path) -> dict[str, str]:
    index = _read_json(path / INDEX_NAME, f"The weight index of {path} is not usable")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path / INDEX_NAME} has no 'weight_map'. Fetch the checkpoint again.")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{path / INDEX_NAME} names {shard!r}, which is not a file name beside the index.")
    return weight_map


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{problem}: {path.name} is missing.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{problem}: {path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{problem}: {path} is not a JSON object.")
    return content


def _matching(path: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for pattern in patterns for file in path.glob(pattern) if file.is_file()]


def _no_weights_message(path: Path) -> str:
    """Says what the directory has instead of `model.safetensors`, and how to get from there to it."""
    looked_for = f"{path} has neither {WEIGHTS_NAME} nor {INDEX_NAME}"
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{looked_for}, only pickle files ({', '.join(pickles[:3])}), which can run code when opened and are "
            "refused. If you trust them, convert once: AutoModelForCausalLM.from_pretrained(directory)"
            ".save_pretrained(new_directory), and the tokenizer in the same way."
        )
    if any(name.startswith("adapter_model") for name in names):
        return f"{looked_for}, only an adapter. Merge it into its base model (peft: merge_and_unload) and save that."
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return f"{looked_for}, but {ggufs[0]} is there: give that file itself as the model."
    others = [name for name in names if name.endswith(".safetensors")]
    return f"{looked_for}{f', only {others[0]}' if others else ''}. Save the model with save_pretrained(directory)."
