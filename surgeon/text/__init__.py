"""Texts to calibrate and to evaluate on: reading, tokens, sequences, and keeping the two apart."""

from surgeon.choices import SequenceOrder
from surgeon.text.separation import SPAN_TOKENS, require_disjoint, require_low_overlap, shared_fraction
from surgeon.text.sequences import Sequences, consecutive_windows, sample_sequences
from surgeon.text.sources import SourceKind, check_spec, read_text, source_kind
from surgeon.text.spec import Text, TextSpec
from surgeon.text.tokenizers import TokenArray, tokenize, tokenizer_digest

__all__ = [
    "SPAN_TOKENS",
    "SequenceOrder",
    "Sequences",
    "SourceKind",
    "Text",
    "TextSpec",
    "TokenArray",
    "check_spec",
    "consecutive_windows",
    "read_text",
    "require_disjoint",
    "require_low_overlap",
    "sample_sequences",
    "shared_fraction",
    "source_kind",
    "tokenize",
    "tokenizer_digest",
]
