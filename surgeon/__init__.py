"""Surgeon: makes trained language models smaller without retraining them, with the curvature of their loss."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds, which the command line and most imports of the package do not need.
    if name == "load":
        from surgeon.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
