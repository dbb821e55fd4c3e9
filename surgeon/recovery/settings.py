"""How a pruned model is trained: what a preset says, and what is asked for in its place."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from surgeon.choices import LossTerm, Recovery, RecoveryPreset
from surgeon.errors import ParameterError

_WHOLE = ("tokens", "length", "batch_tokens", "micro_batch", "warmup", "segment_steps", "validation_tokens", "rank")
TEACHER_TERMS = (LossTerm.KL, LossTerm.HIDDEN, LossTerm.ATTENTION, LossTerm.EMBEDDING)
"""Terms that need the dense model."""


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """How a pruned model is trained.

    Attributes:
        method: low-rank adapters, or all that is left; `none` is no training and has no settings.
        tokens: trained on, rounded up to whole batches.
        length: tokens per row.
        batch_tokens: tokens of a step; a multiple of the length.
        micro_batch: rows at a time; gradients of a step are added up over them.
        learning_rate: the peak.
        warmup: steps in which it rises from zero.
        floor: part of the peak that is left at the end of the cosine.
        betas: of AdamW.
        epsilon: of AdamW.
        weight_decay: of AdamW; not on norms, biases and maps of distillation.
        clip: largest norm of the gradient of a step.
        segment_steps: steps after which the state is stored and the validation loss is measured.
        validation_tokens: held out from training, rounded down to whole rows.
        rank: of the adapters of `lora`.
        linears: last parts of the names of linears that get adapters ("q_proj"); none for all.
        terms: weight of each term of the loss.
        seed: of all draws.

    Reference:
        Jha et al. 2023, *Just CHOP*, appendix (betas, decay, schedule); Hu et al. 2022 (LoRA).
    """

    method: Recovery
    tokens: int
    length: int
    batch_tokens: int
    micro_batch: int
    learning_rate: float
    warmup: int
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    segment_steps: int
    validation_tokens: int
    rank: int = 8
    linears: tuple[str, ...] = ()
    terms: Mapping[LossTerm, float] = field(default_factory=lambda: {LossTerm.LM: 1.0})
    seed: int

    def __post_init__(self) -> None:
        if self.method is Recovery.NONE:
            raise ParameterError("recovery method: none has no settings; allowed: lora, full, distill")
        for name in _WHOLE:
            _require(name, getattr(self, name) >= (0 if name == "warmup" else 1), getattr(self, name), "1 or more")
        _require("length", self.length >= 2, self.length, "2 or more, as a token is predicted from those before it")
        _require("learning_rate", 0 < self.learning_rate < math.inf, self.learning_rate, "above 0 and finite")
        _require("floor", 0 <= self.floor <= 1, self.floor, "0 to 1")
        _require("betas", all(0 <= beta < 1 for beta in self.betas), self.betas, "0 up to, but not, 1")
        _require("weight_decay", 0 <= self.weight_decay < math.inf, self.weight_decay, "0 or more")
        _require("clip", self.clip > 0, self.clip, "above 0")
        _require("seed", self.seed >= 0, self.seed, "0 or more")
        if self.batch_tokens % self.length:
            near = max(1, round(self.batch_tokens / self.length)) * self.length
            raise ParameterError(
                f"recovery batch_tokens: got {self.batch_tokens}, allowed: multiples of the length, {self.length}; "
                f"try {near}"
            )
        if self.warmup >= self.steps and self.steps > 1:
            raise ParameterError(
                f"recovery warmup: got {self.warmup} steps, but {self.tokens} tokens in batches of {self.batch_tokens} "
                f"are {self.steps} steps; allowed: fewer than that. Try {self.steps // 10}, or more tokens"
            )
        self._check_validation()
        self._check_terms()

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def rows_per_step(self) -> int:
        """Rows of a batch."""
        return self.batch_tokens // self.length

    @property
    def validation_rows(self) -> int:
        """Rows held out."""
        return self.validation_tokens // self.length

    @property
    def segments(self) -> tuple[range, ...]:
        """Steps of each segment, from 0."""
        starts = range(0, self.steps, self.segment_steps)
        return tuple(range(start, min(start + self.segment_steps, self.steps)) for start in starts)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the dense model."""
        return any(self.terms.get(term) for term in TEACHER_TERMS)

    def to_json(self) -> dict[str, Any]:
        """All settings, as they are part of a key."""
        plain = asdict(self)
        return plain | {
            "betas": list(self.betas),
            "terms": {str(term): self.terms[term] for term in sorted(self.terms)},
        }

    def _check_validation(self) -> None:
        if not self.validation_rows:
            raise ParameterError(
                f"recovery validation_tokens: got {self.validation_tokens}, allowed: at least one row, {self.length}; "
                f"try {8 * self.length}"
            )

    def _check_terms(self) -> None:
        bad = {str(term): weight for term, weight in self.terms.items() if not 0 < weight < math.inf}
        if bad or not self.terms:
            raise ParameterError(f"recovery terms: got {bad}, allowed: at least one term, each above 0 and finite")
        if self.method is Recovery.FULL and set(self.terms) != {LossTerm.LM}:
            raise ParameterError(
                f"recovery terms: got {', '.join(sorted(self.terms))}, but method full trains on next tokens alone; "
                "use method distill to compare with the dense model"
            )
        if self.method is Recovery.DISTILL and not self.needs_teacher:
            raise ParameterError(
                "recovery terms: got lm alone, but method distill compares with the dense model; "
                f"allowed: at least one of {', '.join(TEACHER_TERMS)}, or use method full"
            )


def preset_settings(
    method: Recovery, preset: RecoveryPreset, *, micro_batch: int, seed: int, **changes: Any
) -> RecoverySettings:
    """The settings of a preset, with others in the place of some.

    Args:
        method: how to train.
        preset: how much.
        micro_batch: rows at a time.
        seed: of all draws.
        changes: fields of `RecoverySettings`; None leaves what the preset says.

    Raises:
        ParameterError: a value is out of range or they do not fit together.
    """
    known = {item.name for item in fields(RecoverySettings)}
    assert changes.keys() <= known, f"{sorted(changes.keys() - known)} are no settings"
    given = {name: value for name, value in changes.items() if value is not None}
    sizes = PRESETS[preset]
    rate = LORA_RATES[preset] if method is Recovery.LORA else sizes.learning_rate
    terms = dict(DEFAULT_TERMS) if method is Recovery.DISTILL else {LossTerm.LM: 1.0}
    steps = math.ceil(given.get("tokens", sizes.tokens) / given.get("batch_tokens", sizes.batch_tokens))
    start = {
        "tokens": sizes.tokens,
        "length": sizes.length,
        "batch_tokens": sizes.batch_tokens,
        "learning_rate": rate,
        "warmup": min(sizes.warmup, steps // 10) if "tokens" in given or "batch_tokens" in given else sizes.warmup,
        "segment_steps": min(sizes.segment_steps, steps),
        "validation_tokens": sizes.validation_tokens,
        "rank": sizes.rank,
        "terms": terms,
    }
    return RecoverySettings(method=method, micro_batch=micro_batch, seed=seed, **(start | given))


@dataclass(frozen=True)
class PresetSizes:
    """What a preset says; see `RecoverySettings`."""

    tokens: int
    length: int
    batch_tokens: int
    learning_rate: float
    warmup: int
    segment_steps: int
    validation_tokens: int
    rank: int


PRESETS: Mapping[RecoveryPreset, PresetSizes] = {
    RecoveryPreset.SMOKE: PresetSizes(8_192, 128, 1_024, 3e-4, 2, 4, 2_048, 8),
    RecoveryPreset.SMALL: PresetSizes(10**9, 2_048, 2**19, 3e-4, 100, 100, 2**19, 64),
    RecoveryPreset.PAPER: PresetSizes(160 * 10**9, 2_048, 2**21, 3e-4, 2_000, 1_000, 2**20, 64),
}
"""Full training: `paper` is that of Just CHOP (its batches of small models), `small` the same with fewer tokens."""

LORA_RATES: Mapping[RecoveryPreset, float] = {
    RecoveryPreset.SMOKE: 1e-2,
    RecoveryPreset.SMALL: 3e-4,
    RecoveryPreset.PAPER: 3e-4,
}
"""Adapters start at zero and have far fewer weights, so their steps are larger (Gromov et al. 2024: 3e-4)."""

DEFAULT_TERMS: Mapping[LossTerm, float] = dict.fromkeys(LossTerm, 1.0)
"""Of `distill`: all five with unit weights, as in Just CHOP."""


def with_terms(settings: RecoverySettings, terms: Mapping[LossTerm, float]) -> RecoverySettings:
    """The same with other terms of the loss, by the method that has them."""
    alone = set(terms) == {LossTerm.LM}
    if settings.method is Recovery.LORA:
        return replace(settings, terms=dict(terms))
    return replace(settings, method=Recovery.FULL if alone else Recovery.DISTILL, terms=dict(terms))


def _require(name: str, is_allowed: bool, got: object, allowed: str) -> None:
    if not is_allowed:
        raise ParameterError(f"recovery {name}: got {got}, allowed: {allowed}")
