"""The time left while a run goes on: as it was planned, until tasks have shown how long they take."""

import pytest

from flows.display import Display


def first_line(display: Display, capsys: pytest.CaptureFixture[str]) -> str:
    display.task_started("b")
    display.update("b", 0, 2)
    return capsys.readouterr().err


def test_the_plan_gives_the_time_left_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=False) as display:
        display.plan({"a": 60.0, "b": 60.0})
        assert first_line(display, capsys).split() == ["0:00", "0%", "b", "about", "2:00", "left"]


def test_tasks_that_turn_out_to_be_there_take_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=False) as display:
        display.plan({"a": 60.0, "b": 60.0, "c": 1.0})
        display.tasks_reused(["a", "of an earlier run"])
        display.tasks_reused(["a"])
        assert first_line(display, capsys).split() == ["0:00", "50%", "b", "about", "1:01", "left"]


def test_what_tasks_took_corrects_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=False) as display:
        display.plan({"a": 600.0, "b": 600.0})
        display.task_started("a")
        display.task_finished("a", cached=False)
        assert capsys.readouterr().err.split() == ["0:00", "50%", "a", "about", "0:00", "left"]


def test_without_a_plan_there_is_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=False) as display:
        assert first_line(display, capsys).split() == ["0:00", "b"]
    with Display(quiet=True) as display:
        display.plan({"b": 1.0})
        assert first_line(display, capsys) == ""
        assert not display.is_shown
