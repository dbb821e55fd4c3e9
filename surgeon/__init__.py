"""Surgeon: makes trained language models smaller without retraining them, with the curvature of their loss."""

__version__ = "0.1.0"
