"""From characters to token ids, and the identity of a tokenizer."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgeon.errors import TextError
from surgeon.text.spec import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenArray = npt.NDArray[np.int64]


def tokenize(text: Text, tokenizer: "PreTrainedTokenizerBase") -> TokenArray:
    """Turns a whole text into token ids at once, with the special tokens that the tokenizer adds by itself.

    Args:
        text: The text.
        tokenizer: Tokenizer of the model.

    Returns:
        `[n_tokens]` int64 token ids.

    Raises:
        TextError: The tokenizer makes no token of the text.
    """
    # A text is longer than any context window; `verbose=False` only turns off the warning about that.
    ids = tokenizer(text.text, verbose=False, truncation=False, padding=False)["input_ids"]
    tokens = np.asarray(ids, dtype=np.int64)
    if tokens.size == 0:
        raise TextError(f"The tokenizer makes no token of text {text.source!r}, split {text.split!r}.")
    return tokens


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of everything that decides which token ids a text becomes.

    It is the same for every copy of a tokenizer and does not depend on earlier calls: truncation and padding, which
    calls leave behind in the tokenizer, are left out.

    Args:
        tokenizer: A tokenizer with or without a serialisable backend.

    Returns:
        64 hexadecimal digits.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state: dict[str, Any] = json.loads(backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state = {"tokenizer": state, "special": _special_tokens(tokenizer)}
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
