"""From what the user names as a model to a checkpoint on disk."""

import difflib
from collections.abc import Callable
from pathlib import Path

from surgeon.errors import ModelError, ParameterError
from surgeon.models.builtin import BUILTIN_NAME, REQUIREMENT, builtin_directory
from surgeon.models.checkpoint import Checkpoint, open_checkpoint
from surgeon.models.gguf import check_gguf, convert_gguf
from surgeon.models.hashes import FileHashes
from surgeon.models.hub import hub_directory, is_hub_id
from surgeon.models.staging import build_directory

Progress = Callable[[str], None]


def resolve_model(
    source: str,
    cache_dir: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Makes a model available as a local directory of safetensors, configuration and tokenizer.

    A directory that already is one is used in place: it is neither copied nor loaded, only its headers are opened and
    its files hashed.

    Args:
        source: The built-in name `smollm2-135m`, a local directory, a local `.gguf` file, or a hub id.
        cache_dir: Where converted models and the memory of file hashes are kept.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether the model's own Python files may be run.
        progress: Called with a line of text before each long step.

    Returns:
        The checkpoint.

    Raises:
        ModelError: The model cannot be found, or its files cannot be used.
        ParameterError: An option was given that has no effect on this kind of source.
    """
    hashes = FileHashes(cache_dir, progress)
    local = Path(source).expanduser()
    is_gguf = source.lower().endswith(".gguf") and not local.is_dir()
    is_local = source == BUILTIN_NAME or is_gguf or local.is_dir()
    _check_options(source, is_local, source == BUILTIN_NAME or is_gguf, revision, trust_remote_code)
    if source == BUILTIN_NAME:
        path, found_revision = builtin_directory(cache_dir, progress), REQUIREMENT
    elif is_gguf:
        path, found_revision = _gguf_directory(local, cache_dir, hashes, progress)
    elif local.is_dir():
        path, found_revision = local, "local"
    elif is_hub_id(source) and not local.exists():
        try:
            path, found_revision = hub_directory(
                source, revision, trust_remote_code=trust_remote_code, progress=progress
            )
        except ModelError as error:
            raise ModelError(f"{error} There is no local directory {source}.{_did_you_mean(source)}") from error
    else:
        raise ModelError(_unknown_message(source, local))
    return open_checkpoint(path, source, found_revision, hashes, trust_remote_code=trust_remote_code)


def _check_options(
    source: str, is_local: bool, is_converted: bool, revision: str | None, trust_remote_code: bool
) -> None:
    if revision is not None and is_local:
        raise ParameterError(f"revision={revision!r} has no effect on {source!r}: only hub models have one. Remove it.")
    if trust_remote_code and is_converted:
        raise ParameterError(f"trust_remote_code has no effect on {source!r}: it brings no code. Remove it.")


def _gguf_directory(
    gguf_file: Path, cache_dir: Path, hashes: FileHashes, progress: Progress | None
) -> tuple[Path, str]:
    check_gguf(gguf_file)
    sha256 = hashes.sha256(gguf_file)
    hashes.save()

    def build(staging: Path) -> None:
        if progress is not None:
            progress(f"converting {gguf_file.name} to safetensors (once)")
        convert_gguf(gguf_file, staging)

    target = cache_dir / "models" / f"{gguf_file.stem}-{sha256[:12]}"
    return build_directory(target, build), f"sha256:{sha256}"


def _unknown_message(source: str, local: Path) -> str:
    if local.is_file():
        return (
            f"{source} is a file, but not a .gguf file. Give the directory it is in, with safetensors weights, "
            "config.json and a tokenizer."
        )
    return (
        f"No model {source!r}. Tried: the built-in name {BUILTIN_NAME!r}; a local directory or .gguf file "
        f"({local.absolute()} does not exist); a hub id (it is not of the form organisation/name)."
        f"{_did_you_mean(source)}"
    )


def _did_you_mean(source: str) -> str:
    name = source.lower().rsplit("/", 1)[-1].replace("_", "-")
    close = difflib.get_close_matches(name, [BUILTIN_NAME], cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
