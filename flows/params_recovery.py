"""The section `recovery`: whether and how the pruned model is trained.

What a preset decides is null by default. A value that is given must be possible and must have an effect.
"""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flows.params_section import Integer, Number, Positive, Section, Word
from flows.params_text import TextParams
from surgeon.choices import LossTerm, Recovery, RecoveryPreset
from surgeon.errors import ParameterError
from surgeon.recovery.settings import DEFAULT_TERMS, RecoverySettings, preset_settings

_Weight = Annotated[Number, Field(ge=0)]
_ADAPTERS = ("rank", "linears")


class TermParams(Section):
    """Weight of each term of the loss; 0 leaves it out, null is what the method says."""

    lm: _Weight | None = None
    kl: _Weight | None = None
    hidden: _Weight | None = None
    attention: _Weight | None = None
    embedding: _Weight | None = None

    def weights(self, defaults: dict[LossTerm, float]) -> dict[LossTerm, float]:
        """The terms that count."""
        given = {term: getattr(self, term.value) for term in LossTerm}
        chosen = {term: defaults.get(term, 0.0) if given[term] is None else given[term] for term in LossTerm}
        return {term: weight for term, weight in chosen.items() if weight}

    @property
    def is_given(self) -> bool:
        """Whether any is."""
        return any(getattr(self, term.value) is not None for term in LossTerm)


class RecoveryParams(Section):
    """How the pruned model is trained; `text` None is the calibration text."""

    method: Recovery = Recovery.NONE
    preset: RecoveryPreset | None = None
    text: TextParams | None = None
    tokens: Positive | None = None
    length: Annotated[Integer, Field(ge=2)] | None = None
    batch_tokens: Positive | None = None
    micro_batch: Positive | None = None
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    warmup: Annotated[Integer, Field(ge=0)] | None = None
    weight_decay: Annotated[Number, Field(ge=0)] | None = None
    clip: Annotated[Number, Field(gt=0)] | None = None
    evaluate_every: Positive | None = None
    validation_tokens: Positive | None = None
    patience: Positive | None = None
    rank: Positive | None = None
    linears: Annotated[tuple[Word, ...], Field(min_length=1)] | None = None
    terms: TermParams = TermParams()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_effects()
        if self.method is not Recovery.NONE:
            try:
                self.settings(batch_size=1, seed=0)
            except ParameterError as error:
                reason = str(error).removeprefix("recovery ")
                raise PydanticCustomError("recovery", "{reason}", {"reason": reason}) from error
        return self

    def settings(self, *, batch_size: int, seed: int) -> RecoverySettings:
        """What training does.

        Args:
            batch_size: rows at a time, where `micro_batch` is not given.
            seed: of the run.

        Raises:
            ParameterError: values do not fit together, or the method is none.
        """
        defaults = dict(DEFAULT_TERMS) if self.method is Recovery.DISTILL else {LossTerm.LM: 1.0}
        return preset_settings(
            self.method,
            self.preset or RecoveryPreset.SMOKE,
            micro_batch=self.micro_batch or batch_size,
            seed=seed,
            tokens=self.tokens,
            length=self.length,
            batch_tokens=self.batch_tokens,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            segment_steps=self.evaluate_every,
            validation_tokens=self.validation_tokens,
            rank=self.rank,
            linears=self.linears,
            terms=self.terms.weights(defaults),
        )

    def resolved(self, *, batch_size: int, seed: int) -> dict[str, Any]:
        """The parameters with every choice made, as plain JSON; null where a parameter has no effect."""
        if self.method is Recovery.NONE:
            return {"method": self.method.value}
        made = self.settings(batch_size=batch_size, seed=seed)
        adapters = self.method is Recovery.LORA
        plain = made.to_json()
        given = self.model_dump(mode="json", include={"preset", "text", "patience"})
        return {
            **{name: plain[name] for name in plain if name not in ("seed", "segment_steps", *_ADAPTERS)},
            **given,
            "evaluate_every": made.segment_steps,
            "rank": made.rank if adapters else None,
            "linears": list(made.linears) if adapters and made.linears else None,
        }

    def _check_effects(self) -> None:
        """Refuses what is given although nothing reads it."""
        given = [name for name in type(self).model_fields if name not in ("method", "terms")]
        given = [name for name in given if getattr(self, name) is not None]
        given += ["terms"] if self.terms.is_given else []
        if self.method is Recovery.NONE and given:
            _refuse(given[0], "method: none, which trains nothing", "set recovery.method to lora, full or distill")
        for name in _ADAPTERS:
            if name in given and self.method is not Recovery.LORA:
                _refuse(name, f"method: {self.method}", "it is about adapters (method: lora)")
        if self.method is Recovery.FULL and self.terms.is_given:
            _refuse("terms", "method: full, which trains on next tokens alone", "use method: distill")


def _refuse(name: str, where: str, advice: str) -> None:
    raise PydanticCustomError(
        "no_effect",
        "{name} has no effect with {where}; leave it null, or {advice}"
        if advice.startswith(("set", "use"))
        else "{name} has no effect with {where}: {advice}; leave it null",
        {"name": name, "where": where, "advice": advice},
    )
