"""Messages: silent as a library, one line each on standard error from the command line, by level."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from p0circuit.log import logger, progress_bar, report_progress, show_messages


def test_a_library_is_silent_and_still_warns(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging; from p0circuit.log import report_progress, progress_bar; report_progress('working'); "
        "print(list(progress_bar([1, 2], 'counting'))); logging.getLogger('p0circuit.training').warning('no reading')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 2]\n" and done.stderr == "no reading\n"


def test_a_program_that_configures_logging_gets_the_messages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "p0circuit"):
        report_progress("100 % of [it]")
    assert caplog.record_tuples == [("p0circuit", logging.INFO, "100 % of [it]")]


def test_messages_are_shown_once_each_and_by_level(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages()
    show_messages(logging.INFO)
    report_progress("see [bold]this[/bold]: 50 %")
    logger.debug("not this")
    assert capsys.readouterr() == ("", "see [bold]this[/bold]: 50 %\n")
    show_messages(logging.DEBUG)
    logger.debug("but %s", "this")
    assert capsys.readouterr().err == "but this\n"
    show_messages(logging.ERROR)
    report_progress("not this")
    logger.error("error: and this")
    assert capsys.readouterr().err == "error: and this\n"


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_a_progress_bar_passes_items_on(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    show_messages(level)
    assert list(progress_bar(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_a_notebook_shows_no_messages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("p0circuit.log.in_notebook", lambda: True)
    show_messages(logging.DEBUG)
    report_progress("working")
    assert capsys.readouterr() == ("", "")
