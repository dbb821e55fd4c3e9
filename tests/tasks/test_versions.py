"""Results in the store are found by the version of their stage, so a version must change when the numbers do."""

import pytest

from tasks.stage import Stage
from tests.tasks.numerics import current, recorded, source_digest, stage_digest, stages

KINDS = (
    *("corpus", "training", "recovered", "recovery"),
    *("boundary", "gradient", "input-factors", "output-factors", "diagonal", "loss-gradient"),
    *("moments", "kronecker-terms", "costs", "mask", "update", "correction"),
    *("similarity", "sub-layer-similarity", "removal-losses", "block-cost", "selection", "dropped"),
    *("prior", "sub-model", "ranking"),
    *("evaluation", "task-scores", "sample", "sequences", "windows", "shot", "block-times", "spectra"),
)


def complaint(kind: str, version: int, source: str, then: dict[str, int | str]) -> str | None:
    """What is wrong with a stage, if its source is not the one that was recorded."""
    if (version, source) == (then.get("version"), then.get("source")):
        return None
    if version == then.get("version"):
        return (
            f"the source that the numbers of {kind!r} depend on has changed, but its version is still {version}: "
            "raise the version in tasks/...py or, if the numbers are unchanged, run "
            "`python -m tests.tasks.numerics` to record"
        )
    return f"{kind!r} has a new version: run `python -m tests.tasks.numerics` to record it"


def test_all_stages_are_watched() -> None:
    assert set(stages()) == set(KINDS) == set(recorded())


@pytest.mark.parametrize("kind", KINDS)
def test_version_is_that_of_the_source(kind: str) -> None:
    now = current()[kind]
    problem = complaint(kind, int(now["version"]), str(now["source"]), recorded().get(kind, {}))
    assert problem is None, problem


@pytest.mark.parametrize("kind", KINDS)
def test_version_does_not_fall(kind: str) -> None:
    assert stages()[kind].version >= int(recorded()[kind]["version"])


def test_complaints() -> None:
    then: dict[str, int | str] = {"version": 2, "source": "abc"}
    assert complaint("costs", 2, "abc", then) is None
    unraised, raised = complaint("costs", 2, "def", then), complaint("costs", 3, "def", then)
    assert unraised is not None
    assert "raise the version in tasks/...py or, if the numbers are unchanged, run `python -m tests" in unraised
    assert raised is not None
    assert raised.startswith("'costs' has a new version")
    assert complaint("costs", 1, "abc", {}) is not None


def test_only_code_counts() -> None:
    plain = "def f(x):\n    return x + 1\n"
    dressed = '"""Module."""\n\n\ndef f(x):  # adds\n    """Adds."""\n    return (x\n            + 1)\n'
    assert source_digest(plain) == source_digest(dressed)
    assert source_digest(plain) != source_digest(plain.replace("1", "2"))


def test_every_source_counts() -> None:
    one = Stage("some", 1, ("surgeon.passes.loss",))
    two = Stage("some", 1, ("surgeon.passes.loss", "surgeon.curvature.gram"))
    assert stage_digest(one) != stage_digest(two)
