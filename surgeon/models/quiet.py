"""Keeps transformers silent while the library uses it, and puts its settings back afterwards."""

import logging as python_logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars, warnings and notes of transformers inside a `with` block.

    Verbosity and progress bars are process-wide settings of transformers; they have their old values again when the
    block ends, also after an exception.
    """
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    # The GGUF reader uses tqdm directly, which no setting of transformers turns off.
    gguf_bar: Any = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    logging.set_verbosity(python_logging.ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if gguf_bar is not None:
        setattr(modeling_gguf_pytorch_utils, "tqdm", _no_bar)  # noqa: B010
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if gguf_bar is not None:
            setattr(modeling_gguf_pytorch_utils, "tqdm", gguf_bar)  # noqa: B010


def _no_bar(items: Iterable[Any], **_options: Any) -> Iterable[Any]:
    """Stands in for `tqdm(items, desc=...)`."""
    return items
