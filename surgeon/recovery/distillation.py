"""Distillation: how far a pruned model is from the dense one in what it computes.

For a batch of rows, with ``p`` the next-token distributions, ``H_k`` the output of block ``k``, ``A_k`` that of its
attention and ``E`` that of the embedding, of teacher (t) and student (s):

- `kl`: mean over predicted tokens of ``KL(p_t ‖ p_s)``, nats;
- `hidden`: ``Σ_k mean (H_t,m(k) - H_s,k W_k)²``, mean over tokens and features;
- `attention`: ``Σ_k mean (A_t,m(k) - A_s,k)²``;
- `embedding`: ``mean (E_t - E_s W)²``;

``m(k)`` the block of the teacher that block ``k`` of the student came from. ``W`` are trained, and start as the
identity. That squares are averaged, not added up, and the map of layers, are ours: the paper does not say.

Reference:
    Jha et al. 2023, *Just CHOP*, section 5; Hinton et al. 2015; Xia et al. 2022 (CoFi), section 3.2.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from surgeon.choices import LossTerm
from surgeon.errors import ParameterError
from surgeon.recovery.objective import logits_of, mean_next_token_loss


@dataclass(frozen=True)
class Taps:
    """Modules of a model whose outputs are compared.

    Attributes:
        embedding: of tokens.
        blocks: for each block compared, the block.
        attention: for each of them the last linear of its attention; None where there is none (any more).
    """

    embedding: nn.Module
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module | None, ...]


@dataclass
class Outputs:
    """What the tapped modules gave in one pass, `[n_rows, length, width]` each, and the logits."""

    logits: Tensor
    embedding: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


def find_taps(embedding: nn.Module, blocks: Sequence[nn.Module], attention_output: str | None) -> Taps:
    """The taps of some blocks.

    Args:
        embedding: of tokens.
        blocks: in order.
        attention_output: name within a block of the last linear of its attention; None if it is not known.
    """
    return Taps(embedding, tuple(blocks), tuple(_linear(block, attention_output) for block in blocks))


class Distillation:
    """The loss of a student beside its teacher; see the module's docstring.

    Args:
        student: the pruned model.
        teacher: the dense model; it gets no gradient.
        taps: of the student and of the teacher, block by block those to be compared.
        terms: which terms are computed.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, taps: tuple[Taps, Taps], terms: Sequence[LossTerm]
    ) -> None:
        self._student, self._teacher = student, teacher
        self._taps = taps
        self._terms = tuple(terms)
        self._pairs = [
            k for k, pair in enumerate(zip(taps[0].attention, taps[1].attention, strict=True)) if None not in pair
        ]
        if LossTerm.ATTENTION in self._terms and not self._pairs:
            raise ParameterError(
                "recovery terms: attention has nothing to compare: no block has an attention of which the last linear "
                "is known and left. Leave attention out, or describe the family in surgeon/models/families.py"
            )
        self._maps: dict[str, nn.Parameter] | None = None

    @property
    def extra(self) -> Mapping[str, nn.Parameter]:
        """The maps ``W`` by name; they need the widths, so both models are run once on one token."""
        if self._maps is None:
            self._maps = self._new_maps()
        return self._maps

    def __call__(self, input_ids: Tensor) -> dict[LossTerm, Tensor]:
        """See `Objective`."""
        with torch.no_grad():
            teacher = _run(self._teacher, self._taps[1], input_ids, self._terms)
        student = _run(self._student, self._taps[0], input_ids, self._terms)
        formulas: dict[LossTerm, Callable[[], Tensor]] = {
            LossTerm.LM: lambda: mean_next_token_loss(student.logits, input_ids),
            LossTerm.KL: lambda: mean_divergence(teacher.logits, student.logits),
            LossTerm.HIDDEN: lambda: self._hidden(teacher, student),
            LossTerm.ATTENTION: lambda: _total(
                mean_square(teacher.attention[k], student.attention[k]) for k in self._pairs
            ),
            LossTerm.EMBEDDING: lambda: mean_square(teacher.embedding, student.embedding, self.extra["map.embedding"]),
        }
        return {term: formulas[term]() for term in self._terms}

    def _hidden(self, teacher: Outputs, student: Outputs) -> Tensor:
        return _total(
            mean_square(teacher.hidden[k], student.hidden[k], self.extra[f"map.hidden.{k}"])
            for k in range(len(self._taps[0].blocks))
        )

    def _new_maps(self) -> dict[str, nn.Parameter]:
        wanted = {LossTerm.HIDDEN, LossTerm.EMBEDDING} & set(self._terms)
        if not wanted:
            return {}
        device = next(self._student.parameters()).device
        one = torch.zeros(1, 2, dtype=torch.long, device=device)
        with torch.no_grad():
            student = _run(self._student, self._taps[0], one, self._terms)
            teacher = _run(self._teacher, self._taps[1], one, self._terms)
        maps = {}
        if LossTerm.EMBEDDING in wanted:
            maps["map.embedding"] = identity_map(student.embedding, teacher.embedding)
        if LossTerm.HIDDEN in wanted:
            for k in range(len(self._taps[0].blocks)):
                maps[f"map.hidden.{k}"] = identity_map(student.hidden[k], teacher.hidden[k])
        return maps


def mean_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """``KL(teacher ‖ student)`` of next tokens, nats per predicted token (the last position predicts none).

    Args:
        teacher: logits `[n_rows, length, n_vocabulary]`.
        student: likewise.
    """
    student_log, teacher_log = (log_softmax(_wide(logits[:, :-1]), dim=-1) for logits in (student, teacher))
    divergence: Tensor = kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    return divergence / (teacher.shape[0] * (teacher.shape[1] - 1))


def mean_square(teacher: Tensor, student: Tensor, mapped_by: Tensor | None = None) -> Tensor:
    """``mean (T - S W)²`` over all entries, in float32.

    Args:
        teacher: `[n_rows, length, width_t]`.
        student: `[n_rows, length, width_s]`.
        mapped_by: ``W`` `[width_s, width_t]`; None for the identity.
    """
    with torch.autocast(student.device.type, enabled=False):
        mapped = _wide(student) if mapped_by is None else _wide(student) @ mapped_by
        return (_wide(teacher) - mapped).square().mean()


def identity_map(student: Tensor, teacher: Tensor) -> nn.Parameter:
    """``W`` `[width_s, width_t]` float32: ones on the diagonal, so that equal widths start as they are."""
    return nn.Parameter(torch.eye(student.shape[-1], teacher.shape[-1], device=student.device))


def _wide(values: Tensor) -> Tensor:
    """In float32, or float64 where they are."""
    return values if values.dtype is torch.float64 else values.float()


def _total(terms: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _run(model: nn.Module, taps: Taps, input_ids: Tensor, terms: Sequence[LossTerm]) -> Outputs:
    """One pass with notes of what the taps of these terms give."""
    found: dict[tuple[LossTerm, int], Tensor] = {}
    with _noting(taps, terms, found):
        logits = logits_of(model, input_ids)
    embedding = found.pop((LossTerm.EMBEDDING, 0), logits)
    outputs = Outputs(logits, embedding)
    for (term, index), value in found.items():
        (outputs.hidden if term is LossTerm.HIDDEN else outputs.attention)[index] = value
    return outputs


@contextmanager
def _noting(taps: Taps, terms: Sequence[LossTerm], found: dict[tuple[LossTerm, int], Tensor]) -> Iterator[None]:
    """Notes what the taps of some terms give while it is entered."""
    modules = {
        LossTerm.EMBEDDING: (taps.embedding,),
        LossTerm.HIDDEN: taps.blocks,
        LossTerm.ATTENTION: taps.attention,
    }

    def note(place: tuple[LossTerm, int], _module: nn.Module, _inputs: Any, output: Any) -> None:
        found[place] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for term in modules.keys() & set(terms):
            for index, module in enumerate(modules[term]):
                if module is not None:
                    stack.callback(module.register_forward_hook(partial(note, (term, index))).remove)
        yield


def _linear(block: nn.Module, name: str | None) -> nn.Module | None:
    """The linear of this name, if the block has it and it is not empty."""
    if name is None:
        return None
    try:
        module = block.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) and module.weight.numel() else None
