"""The section `recovery`: what it comes to, and what is refused when it is loaded."""

import pytest

from flows.params import load_params
from surgeon.choices import LossTerm, Recovery
from surgeon.errors import ParameterError


def recovery(*overrides):
    return load_params(None, [f"recovery.{override}" for override in overrides]).recovery


def settings(*overrides):
    return recovery(*overrides).settings(batch_size=3, seed=7)


def test_nothing_is_trained_by_default():
    given = load_params(None).recovery
    assert given.method is Recovery.NONE
    assert given.resolved(batch_size=4, seed=0) == {"method": "none"}


def test_presets_and_changes():
    smoke = settings("method=full")
    assert (smoke.tokens, smoke.micro_batch, smoke.seed, smoke.terms) == (8192, 3, 7, {LossTerm.LM: 1.0})
    assert settings("method=full", "micro_batch=2").micro_batch == 2
    assert settings("method=full", "preset=paper").tokens == 160_000_000_000
    changed = settings("method=lora", "rank=3", "linears=[q_proj]", "tokens=2048", "evaluate_every=1")
    assert (changed.rank, changed.linears, changed.steps, len(changed.segments)) == (3, ("q_proj",), 2, 2)


def test_terms():
    assert settings("method=distill").terms == dict.fromkeys(LossTerm, 1.0)
    logits = settings("method=distill", "terms={hidden: 0, attention: 0, embedding: 0, kl: 2}")
    assert logits.terms == {LossTerm.LM: 1.0, LossTerm.KL: 2.0}
    assert settings("method=lora", "terms.kl=0.5").terms == {LossTerm.LM: 1.0, LossTerm.KL: 0.5}


def test_resolved_says_what_has_an_effect():
    full = recovery("method=full").resolved(batch_size=4, seed=0)
    assert (full["rank"], full["linears"], full["evaluate_every"], full["micro_batch"]) == (None, None, 4, 4)
    assert recovery("method=lora").resolved(batch_size=4, seed=0)["rank"] == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tokens=1024"],
            "tokens has no effect with method: none, which trains nothing; leave it null, or set recovery",
        ),
        (["terms.kl=1"], "terms has no effect with method: none"),
        (["method=full", "rank=8"], r"rank has no effect with method: full: it is about adapters \(method: lora\)"),
        (["method=distill", "linears=[q_proj]"], "linears has no effect with method: distill: it is about adapters"),
        (
            ["method=full", "terms.kl=1"],
            "terms has no effect with method: full, which trains on next tokens alone; leave",
        ),
        (
            ["method=distill", "terms={kl: 0, hidden: 0, attention: 0, embedding: 0}"],
            "got lm alone, but method distill",
        ),
        (["method=lora", "terms={lm: 0}"], "terms: got {}, allowed: at least one term"),
        (
            ["method=full", "batch_tokens=1000"],
            "batch_tokens: got 1000, allowed: multiples of the length, 128; try 1024",
        ),
        (["method=full", "warmup=8"], "warmup: got 8 steps, but 8192 tokens in batches of 1024 are 8 steps"),
        (["method=full", "tokens=0"], "must be greater than or equal to 1"),
        (["method=ful"], "got 'ful'; allowed: none, lora, full, distill. Did you mean 'full'"),
        (["method=full", "learning_rat=1"], "unknown key. Did you mean 'learning_rate'"),
        (
            ["method=full", "text={source: python-docs, split: held-out}"],
            "recovery.text and evaluate.text are the same source and split",
        ),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(ParameterError, match=message.replace("{}", r"\{\}")):
        recovery(*overrides)
