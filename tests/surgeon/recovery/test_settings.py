"""Presets, what is refused, and the learning rate of each step."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from surgeon.choices import LossTerm, Recovery, RecoveryPreset
from surgeon.errors import ParameterError
from surgeon.recovery.schedule import rate_at
from surgeon.recovery.settings import PRESETS, preset_settings, with_terms
from tests.surgeon.recovery.small import settings


def preset(method=Recovery.FULL, name=RecoveryPreset.SMOKE, **changes):
    return preset_settings(method, name, micro_batch=4, seed=0, **changes)


def test_presets():
    smoke = preset()
    assert (smoke.tokens, smoke.batch_tokens, smoke.steps) == (8192, 1024, 8)
    assert [len(segment) for segment in smoke.segments] == [4, 4]
    paper = preset(name=RecoveryPreset.PAPER)
    assert (paper.tokens, paper.learning_rate, paper.warmup) == (160_000_000_000, 3e-4, 2000)
    assert (paper.betas, paper.weight_decay, paper.clip, paper.floor) == ((0.9, 0.95), 0.1, 1.0, 0.1)
    assert preset(name=RecoveryPreset.SMALL).tokens == 1_000_000_000
    for name in PRESETS:
        for method in (Recovery.LORA, Recovery.FULL, Recovery.DISTILL):
            assert sum(map(len, preset(method, name).segments)) == preset(method, name).steps


def test_terms_of_methods():
    assert preset().terms == {LossTerm.LM: 1.0}
    assert not preset().needs_teacher
    distilled = preset(Recovery.DISTILL)
    assert distilled.terms == dict.fromkeys(LossTerm, 1.0)
    assert distilled.needs_teacher
    assert with_terms(distilled, {LossTerm.LM: 1.0}).method is Recovery.FULL
    assert with_terms(preset(), {LossTerm.LM: 1.0, LossTerm.KL: 2.0}).method is Recovery.DISTILL
    assert with_terms(preset(Recovery.LORA), {LossTerm.KL: 1.0}).method is Recovery.LORA


def test_changes_take_the_place_of_what_a_preset_says():
    given = preset(tokens=100 * 1024, learning_rate=None, rank=3)
    assert (given.steps, given.rank, given.learning_rate) == (100, 3, preset().learning_rate)
    one = preset(tokens=1024)
    assert (one.steps, one.warmup, len(one.segments)) == (1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "recovery tokens: got 0, allowed: 1 or more"),
        ({"length": 1}, "recovery length: got 1, allowed: 2 or more, as a token is predicted"),
        ({"batch_tokens": 25}, "batch_tokens: got 25, allowed: multiples of the length, 6; try 24"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, allowed: above 0 and finite"),
        ({"learning_rate": math.nan}, "learning_rate: got nan, allowed: above 0"),
        ({"warmup": 6}, "warmup: got 6 steps, but 144 tokens in batches of 24 are 6 steps; allowed: fewer"),
        ({"validation_tokens": 5}, "validation_tokens: got 5, allowed: at least one row, 6; try 48"),
        ({"floor": 1.5}, "floor: got 1.5, allowed: 0 to 1"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1, allowed: 0 or more"),
        ({"clip": 0.0}, "clip: got 0.0, allowed: above 0"),
        ({"seed": -1}, "seed: got -1, allowed: 0 or more"),
        ({"rank": 0}, "rank: got 0, allowed: 1 or more"),
        ({"method": Recovery.NONE}, "method: none has no settings; allowed: lora, full, distill"),
        ({"terms": {}}, "allowed: at least one term, each above 0"),
        ({"terms": {LossTerm.LM: 0.0}}, "got {'lm': 0.0}, allowed: at least one term, each above 0"),
        ({"terms": {LossTerm.LM: 1.0, LossTerm.KL: 1.0}}, "got kl, lm, but method full trains on next tokens alone"),
        ({"method": Recovery.DISTILL}, "got lm alone, but method distill compares with the dense model"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ParameterError, match=message):
        settings(**changes)


def test_rates():
    given = settings(tokens=24 * 11, warmup=3, learning_rate=4e-3)
    rates = [rate_at(given, step) for step in range(given.steps)]
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert rates[-1] == pytest.approx(4e-4)
    assert rates[4] == pytest.approx(4e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 7)) / 2))
    assert all(first > second for first, second in pairwise(rates[3:]))
    level = replace(given, floor=1.0, warmup=0)
    assert [rate_at(level, step) for step in range(level.steps)] == pytest.approx([4e-3] * level.steps)
    assert rate_at(settings(tokens=24, warmup=0), 0) == 1e-2
