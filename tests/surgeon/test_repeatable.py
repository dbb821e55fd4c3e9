"""The switch for repeatable algorithms is on as long as anybody needs it, and then as it was."""

import torch

from surgeon.repeatable import repeatable


def is_on() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def test_on_as_long_as_anybody_needs_it() -> None:
    first, second = repeatable("cuda:0"), repeatable("cuda")
    first.__enter__()
    second.__enter__()
    assert is_on()
    first.__exit__(None, None, None)
    assert is_on(), "the other still needs it"
    second.__exit__(None, None, None)
    assert not is_on()


def test_strict_as_long_as_anybody_is() -> None:
    warns = torch.is_deterministic_algorithms_warn_only_enabled
    with repeatable("cuda"):
        assert warns()
        one, two = repeatable("cuda", strict=True), repeatable("cuda", strict=True)
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        assert not warns()
        two.__exit__(None, None, None)
        assert is_on()
        assert warns()
    assert not is_on()


def test_nothing_changes_on_a_cpu() -> None:
    with repeatable("cpu"):
        assert not is_on()


def test_what_was_on_stays_on() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with repeatable("cuda"):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert is_on()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
