"""Checkpoints from the Hugging Face hub: fetches safetensors, configuration and tokenizer, and nothing else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from surgeon.errors import ModelError
from surgeon.models.checkpoint import CONFIG_NAME, TOKENIZER_PATTERNS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", CONFIG_NAME, "generation_config.json")
# Patterns match across folders; weights in subfolders and in other naming schemes are copies in another format.
_UNWANTED = ["*/*", "consolidated*", "adapter_model*"]


class _SilentBar(tqdm):
    """A progress bar that is never shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["disable"] = True
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]


def is_hub_id(source: str) -> bool:
    """Says whether a text has the form `organisation/name`."""
    return _HUB_ID.fullmatch(source) is not None


def hub_directory(
    source: str, revision: str | None, *, trust_remote_code: bool, progress: Callable[[str], None] | None
) -> tuple[Path, str]:
    """Fetches a model from the hub into the hub's own cache, or finds it there.

    Args:
        source: A hub id, `organisation/name`.
        revision: A branch, tag or commit; the default branch if None.
        trust_remote_code: Whether Python files are fetched too.
        progress: Called with a line of text before fetching.

    Returns:
        The local directory and the commit it holds.

    Raises:
        ModelError: The model does not exist, is not open to this user, or the hub cannot be reached.
    """
    if progress is not None:
        progress(f"fetching {source} from the hub")
    wanted = [*_WEIGHT_PATTERNS, *TOKENIZER_PATTERNS, *(["*.py"] if trust_remote_code else [])]
    try:
        path = snapshot_download(
            source, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED, tqdm_class=_SilentBar
        )
    except GatedRepoError as error:
        raise ModelError(f"{source} is gated. Accept its terms on the hub, then run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{source} has no revision {revision!r}. Give a branch, tag or commit of it.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {source!r}, or it is private. Check the name, or run `hf auth login`."
        ) from error
    except (HFValidationError, OSError) as error:  # the hub's and the network's errors are all OSError
        raise ModelError(
            f"{source} could not be fetched from the hub ({type(error).__name__}: {_first_line(error)}). Check the "
            "network, or give a local directory or GGUF file."
        ) from error
    # The hub names a snapshot's directory after its commit.
    return Path(path), Path(path).name


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no details"
