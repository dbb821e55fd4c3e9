"""The work of what follows pruning, and what of the shapes it shares with the work before."""

import torch

from flows.session import Session
from surgeon.choices import ExportLayout
from surgeon.planning.passes import BlockShape, forward_work, step_work
from surgeon.planning.work import NOTHING, Work
from surgeon.pruning.granularity import is_structured
from surgeon.text import read_text
from tasks.calibration import load_tokenizer

_PROBE_TOKENS = 32
"""Tokens of the two sequences that an export is checked with."""
_WORKER_STARTS = 1.3
"""Starting two processes at the same time, over starting one."""
_TOKENIZED = 100_000
"""Characters that are tokenised to guess how many tokens a whole text has."""


def token_work(session: Session, kept: float, batch_size: int) -> Work:
    """One token each for some sequences, by a model that keeps a part of its decoder weights."""
    model = session.model
    n = model.n_parameters - (1.0 - kept) * model.n_weights
    n_head = model.width * model.n_vocabulary
    return step_work(n * model.torch_dtype.itemsize, kept * model.n_weights + n_head, batch_size)


def export_work(session: Session) -> Work:
    """Writing the checkpoint, the logits to compare with, and loading it in a process of its own."""
    n_bytes = exported_bytes(session)
    here = Work.of(files=n_bytes, openings=2) + token_work(session, 1.0, _PROBE_TOKENS)
    return here + Work.of(processes=1, loads=n_bytes) + 2 * token_work(session, kept_share(session), _PROBE_TOKENS)


def benchmark_work(session: Session) -> Work:
    """Both models loaded side by side; each batch size a warm-up and the rounds: prompt, then token by token."""
    given, model = session.params.benchmark, session.model
    if not given.rounds:
        return NOTHING
    blocks = block_shapes(session)
    total = Work.of(processes=_WORKER_STARTS, loads=2 * model.n_parameters * model.torch_dtype.itemsize)
    for kept in (1.0, kept_share(session)):
        for size in given.batch_sizes:
            prompt = kept * forward_work(blocks, size * given.prompt, given.prompt) + token_work(session, kept, 1)
            total += (given.rounds + 1) * (prompt + given.new_tokens * token_work(session, kept, size))
    return total


def kept_share(session: Session) -> float:
    """Part of the decoder weights that the exported model has: what is removed whole is not written."""
    is_dense = session.params.export.layout is ExportLayout.DENSE
    return 1.0 if is_dense or not is_structured(session.recipe.granularity) else 1.0 - session.goal.fraction


def exported_bytes(session: Session) -> int:
    """Bytes of the exported weights, as far as the parameters tell."""
    model, given = session.model, session.params
    dtype: torch.dtype = getattr(torch, given.export.dtype or given.model.dtype)
    return int((model.n_parameters - (1.0 - kept_share(session)) * model.n_weights) * dtype.itemsize)


def block_shapes(session: Session) -> tuple[BlockShape, ...]:
    """What a token costs in each block of a session's model."""
    model = session.model
    shapes = []
    for index, block in enumerate(model.blocks):
        width = model.width
        if model.couplings is not None:
            attention = model.couplings[index].attention
            width = attention.n_query_heads * attention.head_dim
        shapes.append(BlockShape(sum(s.n_weights for s in block), width))
    return tuple(shapes)


def n_windows(session: Session) -> int:
    """Evaluation windows: as many as asked for, or as many as the text is likely to give."""
    given = session.params.evaluate
    if given.windows is not None:
        return given.windows
    text = read_text(given.text.spec()).text
    start = text[:_TOKENIZED]
    n_tokens = len(load_tokenizer(session.checkpoint)(start)["input_ids"]) * len(text) / max(1, len(start))
    return max(1, int(n_tokens) // given.length)
