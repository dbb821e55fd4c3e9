"""SHA-256 of large files, remembered in a small JSON file so that an unchanged file is read once."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

MEMORY_NAME = "surgeon-files.json"


class FileHashes:
    """SHA-256 of files by absolute path, size and modification time.

    Args:
        cache_dir: Directory of the memory file `surgeon-files.json`. Nothing is written beside the hashed files.
        progress: Called with a line of text before a large file is hashed.
    """

    def __init__(self, cache_dir: Path, progress: Callable[[str], None] | None = None) -> None:
        self._memory_path = cache_dir / MEMORY_NAME
        self._progress = progress
        self._memory = self._load()
        self._changed = False

    def sha256(self, path: Path) -> str:
        """Returns the SHA-256 of a file in hexadecimal, from memory if its size and time have not changed."""
        status = path.stat()
        key = str(path.absolute())
        known = self._memory.get(key)
        if known is not None and known[:2] == [status.st_size, status.st_mtime_ns]:
            return str(known[2])
        if self._progress is not None and status.st_size > 2**27:
            self._progress(f"hashing {path.name} ({status.st_size / 2**30:.1f} GiB)")
        digest = file_sha256(path)
        self._memory[key] = [status.st_size, status.st_mtime_ns, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Writes the memory file by rename, without files that no longer exist. Does nothing if nothing is new."""
        if not self._changed:
            return
        # Another process may have added files meanwhile: its entries are kept.
        merged = {**self._load(), **self._memory}
        kept = {key: value for key, value in sorted(merged.items()) if Path(key).exists()}
        self._memory_path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._memory_path.with_name(f".{MEMORY_NAME}.{os.getpid()}")
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.replace(self._memory_path)
        self._changed = False

    def _load(self) -> dict[str, list[int | str]]:
        """Reads the memory file; an unreadable one only costs hashing again."""
        try:
            entries = json.loads(self._memory_path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(entries, dict):
            return {}
        return {key: value for key, value in entries.items() if isinstance(value, list) and len(value) == 3}


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal, always by reading it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
