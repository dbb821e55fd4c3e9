"""One round of Bonsai: what its tasks share, and the model that they run, which stays open between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from surgeon.bonsai.parts import MaskedPart
from surgeon.bonsai.sampling import Candidates, candidates_of
from surgeon.bonsai.settings import BonsaiSettings
from surgeon.bonsai.utility import token_batches
from surgeon.choices import Allocation
from surgeon.passes.curvature import TokenArray
from surgeon.precision import float32_products
from surgeon.pruning.units import SubLayer
from surgeon.shortage import memory_advice
from surgeon.store import Reference
from tasks.context import Context, ModelSpec, ModelState
from tasks.rule import MaskRule
from tasks.stage import read_arrays
from tasks.units import dense_usage, permitted_widths, unit_parts
from tasks.weights import open_shrunk, read_live

FloatArray = NDArray[np.float64]

_ROUNDING = 1e-9
_ADVICE = (
    "Lower run.batch_size or calibrate.length, or use model.dtype=bfloat16. Finished rounds and sub-models are kept: "
    "the same command goes on after the last, but another batch size measures everything anew."
)


@dataclass(frozen=True)
class Round:
    """One round on one state.

    Attributes:
        state: the model before it.
        calibration: its sequences.
        rule: how much is to be gone after it, and how widths are chosen.
        settings: how it is learnt what goes.
        number: from 1; it keys the draws.
        label: of the shot that it is.
    """

    state: ModelState
    calibration: Reference
    rule: MaskRule
    settings: BonsaiSettings
    number: int
    label: str

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the model and of what it is run on."""
        return {"weights": self.state.digest, "calibration": self.calibration.digest}

    @property
    def sampling(self) -> dict[str, Any]:
        """What decides which units stand for election, and which of them a sub-model lacks."""
        units = self.rule.recipe.units
        assert units is not None, "Bonsai prunes units"
        return {
            "target": self.rule.target,
            "usage": self.rule.usage.parameters,
            "multiple": units.multiple,
            "heads": units.heads,
            "allocation": self.rule.recipe.allocation,
            "seed": self.settings.seed,
            "round": self.number,
        }

    def tokens(self, context: Context) -> TokenArray:
        """The sequences it is measured on, `[n_sequences, length]`."""
        tokens: TokenArray = read_arrays(context, self.calibration.key)["tokens"][: self.settings.sequences]
        return tokens


@dataclass(frozen=True)
class LivePart:
    """A sub-layer of which something lives.

    Attributes:
        block: index.
        sub: its units in the dense model.
        units: those that live, ascending, `[n_live]` int64.
    """

    block: int
    sub: SubLayer
    units: NDArray[np.int64]


def live_parts(context: Context, state: ModelState) -> list[LivePart]:
    """All sub-layers of a state of which something lives, in the order of `unit_parts`; no weights are read."""
    parts = []
    for block, sub in unit_parts(context.model):
        if block in state.removed:
            continue
        live = sub.live_units(read_live(context, state, block)[sub.output][1])
        if live.any():
            parts.append(LivePart(block, sub, live.nonzero()[:, 0].numpy()))
    return parts


def round_candidates(
    model: ModelSpec, parts: Sequence[LivePart], rule: MaskRule, scores: Sequence[FloatArray]
) -> list[Candidates]:
    """Which units stand for election: of each sub-layer twice as many as its even share of what must go.

    Departure from the published code: the share is one of what lives and may go. There it is one of what lives, but the
    amount to go one of the dense model, so that late rounds run out of candidates.

    Args:
        model: shapes and couplings.
        parts: what lives.
        rule: how much is to go.
        scores: for each of the parts the prior of its units, `[n_live]` float64.
    """
    permitted = [permitted_widths(part.sub, part.units.size, rule) for part in parts]
    usage = [rule.usage.of(part.sub)[: part.units.size + 1] for part in parts]
    may_go = [bool(own[:-1].any()) for own in permitted]
    if rule.recipe.allocation is Allocation.GLOBAL:
        whole = sum(float(rule.usage.of(sub)[-1]) for _, sub in unit_parts(model))
        excess = sum(float(own[-1]) for own in usage) - (whole - rule.target * dense_usage(model, rule.usage))
        going = sum(float(own[-1] - own[0]) for own, may in zip(usage, may_go, strict=True) if may)
        shares = [excess / going if may and going else 0.0 for may in may_go]
    else:
        dense = [float(rule.usage.of(part.sub)[-1]) for part in parts]
        shares = [1.0 - (1.0 - rule.target) * all_ / float(own[-1]) for own, all_ in zip(usage, dense, strict=True)]
    wanted = [_wanted(s, u, p) for s, u, p in zip(shares, usage, permitted, strict=True)]
    return [candidates_of(own, *pair) for own, pair in zip(scores, wanted, strict=True)]


def _wanted(share: float, usage: FloatArray, permitted: NDArray[np.bool_]) -> tuple[float, int]:
    """Fraction of units to go, and how many must be able to go so that a permitted width frees the share."""
    share = min(max(share, 0.0), 1.0)
    n_live = usage.size - 1
    enough = usage[-1] - usage[:n_live] >= share * (usage[-1] - usage[0]) * (1.0 - _ROUNDING)
    kept = np.flatnonzero(permitted[:n_live] & enough)
    return share, n_live - int(kept[-1]) if share > 0 and kept.size else 0


@dataclass
class OpenRound:
    """The model of a round in memory.

    Attributes:
        model: as small as what is left of it.
        live: its sub-layers, as far as they live.
        parts: the same as what can be masked.
        tokens: calibration sequences, `[n_sequences, length]`.
        inputs: the same by batch on the device of the model.
    """

    model: nn.Module
    live: list[LivePart]
    parts: list[MaskedPart]
    tokens: TokenArray
    inputs: list[Tensor]
    _candidates: dict[str, list[Candidates]] = field(default_factory=dict)

    def candidates(self, context: Context, work: Round, prior: Reference) -> list[Candidates]:
        """Which units stand for election; the same for all sub-models of a round, and so kept."""
        key = f"{prior.digest} {work.sampling}"
        if key not in self._candidates:
            self._candidates[key] = stored_candidates(context, work, prior, self.live)
        return self._candidates[key]


def stored_candidates(context: Context, work: Round, prior: Reference, live: Sequence[LivePart]) -> list[Candidates]:
    """Which units stand for election, by stored priors."""
    ends = np.cumsum([part.units.size for part in live])[:-1]
    scores = np.split(read_arrays(context, prior.key)["scores"], ends)
    return round_candidates(context.model, live, work.rule, scores)


class _Resident:
    """The model that was opened last. Sub-models are tasks of their own, and opening a model takes as long as several.

    One task uses it at a time: masks are hooks in the model.
    """

    lock = RLock()
    key: tuple[object, ...] | None = None
    opened: OpenRound | None = None


@contextmanager
def opened_round(context: Context, work: Round) -> Iterator[OpenRound]:
    """The model of a round, which nothing else uses for as long as the context lasts.

    Raises:
        MemoryShortageError: it does not fit, or what is run on it does not.
    """
    settings = (context.store, context.device, context.dtype, context.batch_size)
    key = (*settings, work.state.digest, work.calibration.digest, work.settings.sequences)
    with _Resident.lock, memory_advice(f"{work.label}: running the model on calibration sequences", _ADVICE):
        if key != _Resident.key or _Resident.opened is None:
            close_round()
            _Resident.opened, _Resident.key = _open(context, work), key
        with float32_products(context.precision):
            yield _Resident.opened


def close_round() -> None:
    """Gives the memory of the model back that was opened last."""
    with _Resident.lock:
        _Resident.key, _Resident.opened = None, None


def _open(context: Context, work: Round) -> OpenRound:
    shrunk = open_shrunk(context, work.state)
    live, parts = live_parts(context, work.state), []
    for part in live:
        linear = shrunk.linear(part.block, part.sub.output)
        assert isinstance(linear, nn.Linear), f"block {part.block}, {part.sub.output} has live units"
        parts.append(MaskedPart(part.block, part.sub.kind, linear, part.units.size, part.sub.width))
    tokens = work.tokens(context)
    return OpenRound(shrunk.model, live, parts, tokens, token_batches(shrunk.model, tokens, context.batch_size))
