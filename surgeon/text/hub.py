"""Text of hub data sets."""

import re
from typing import Any

from surgeon.errors import TextError
from surgeon.text.python_docs import PYTHON_DOCS
from surgeon.text.rows import join_rows, quiet_datasets
from surgeon.text.spec import TextSpec
from surgeon.text.suggest import did_you_mean

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_OFFLINE = f"Local files and {PYTHON_DOCS!r} work offline."


def is_hub_name(source: str) -> bool:
    """Whether a source is written as `name`, `organisation/name`, or either followed by `:config`."""
    return _HUB_NAME.fullmatch(source) is not None


def read_hub(spec: TextSpec, column: str) -> tuple[str, str]:
    """Reads one split of a hub data set.

    Args:
        spec: Data set, split and revision.
        column: Column that holds the text.

    Returns:
        The rows joined by empty lines, and the commit they come from.

    Raises:
        TextError: The data set cannot be reached or read, or has no such split or column.
    """
    import datasets  # takes a second; most runs need no data set

    name, _, config = spec.source.partition(":")
    with quiet_datasets():
        try:
            builder = datasets.load_dataset_builder(name, config or None, revision=spec.revision)
            builder.download_and_prepare()
        except Exception as error:  # errors of datasets, of the hub client and of the network, without a common base
            raise TextError(_unreachable(spec, error)) from error
        splits = list(builder.info.splits)
        if spec.split not in splits:
            raise TextError(
                f"Data set {spec.source!r} has no split {spec.split!r}; its splits are {', '.join(splits)}."
                f"{did_you_mean(spec.split or '', splits)}"
            )
        rows: Any = builder.as_dataset(split=spec.split)
        return join_rows(rows, column, f"data set {spec.source!r}"), str(builder.hash)


def _unreachable(spec: TextSpec, error: Exception) -> str:
    """What failed, in the words of datasets, and what works instead."""
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = "Name a configuration as `name:config`. " if "config" in reason.lower() else ""
    revision = f" at revision {spec.revision!r}" if spec.revision else ""
    return (
        f"Data set {spec.source!r}{revision} cannot be read from the hub, and no local file has that name: {reason} "
        f"{advice}{_OFFLINE}{did_you_mean(spec.source, [PYTHON_DOCS])}"
    )
