"""The text and the settings that benchmarks on a real model share, so that their numbers compare.

SmolLM2-135M; WikiText-2 in its word-level form from the folder in `SURGEON_TEXT_DIR` (`valid.txt`, `test.txt`);
calibration on 24 sequences of 256 tokens at random offsets of `valid.txt`; perplexity on the first 8 windows of 256
tokens of `test.txt`.
"""

import os
import sys
from pathlib import Path

from flows.engine import InlineEngine
from flows.params import load_params
from flows.session import Session
from flows.workspace import Workspace


def text_directory() -> Path:
    """The folder with `valid.txt` and `test.txt`; ends the program with a message if it is not given."""
    given = os.environ.get("SURGEON_TEXT_DIR")
    if not given or not (Path(given) / "valid.txt").is_file():
        sys.exit("Set SURGEON_TEXT_DIR to a folder with WikiText-2's valid.txt and test.txt (word-level form).")
    return Path(given).resolve()


def open_session(project: Path, *overrides: str, sequences: int = 24) -> Session:
    """A session on the shared protocol, without a server; results are cached below ``project``."""
    text = text_directory()
    shared = [
        "run.engine=inline",
        f"calibrate.text.source={text / 'valid.txt'}",
        f"evaluate.text.source={text / 'test.txt'}",
        f"calibrate.sequences={sequences}",
        "calibrate.length=256",
        "calibrate.order=random-offsets",
        "evaluate.windows=8",
        "evaluate.length=256",
    ]
    params = load_params(None, [*shared, *overrides])
    return Session(params, Workspace(project.resolve()), InlineEngine())
