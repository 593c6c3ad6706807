"""The page that a run leaves: written at a good and a bad end, and never the reason of a bad one."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.run import LogSection
from rlhf.errors import NumericsError, PreemptedError
from rlhf.launch.end_report import report_at_end
from rlhf.orchestrator.run.console import PlainConsole
from rlhf.orchestrator.run.run_directory import RunDirectory, Status
from rlhf.orchestrator.run.trackers import JsonLines


def end(folder: Path, act: Callable[[], None], section: LogSection | None = None) -> list[str]:
    """What a run says at its end, of which `act` is the last thing that happened."""
    out = io.StringIO()
    with RunDirectory.open(folder, resume=False) as directory:
        JsonLines(directory.metrics).log(1, {"policy/loss": 2.0})
        directory.write_status(Status.DONE, step=1, num_steps=1)
        console = PlainConsole(1, out)
        try:
            with report_at_end(LogSection() if section is None else section, directory, console):
                act()
        except Exception as error:
            console.say(f"raised {type(error).__name__}")
    return out.getvalue().splitlines()


def nothing() -> None:
    """A good end."""


def fail() -> None:
    raise NumericsError("nothing was learned")


def preempt() -> None:
    raise PreemptedError("asked to stop")


def test_a_good_end_tells_the_verdict_and_the_page(tmp_path: Path) -> None:
    lines = end(tmp_path / "a", nothing)
    assert lines[0].startswith("Done: step 1 of 1")
    assert lines[1:] == [f"report: {tmp_path}/a/report.html"]
    assert (tmp_path / "a/report.html").is_file()


def test_a_failure_has_a_page_and_is_raised(tmp_path: Path) -> None:
    assert end(tmp_path / "a", fail) == [f"report: {tmp_path}/a/report.html", "raised NumericsError"]
    assert (tmp_path / "a/report.html").is_file()


def test_a_run_that_continues_later_has_none(tmp_path: Path) -> None:
    assert end(tmp_path / "a", preempt) == ["raised PreemptedError"]
    assert not (tmp_path / "a/report.html").exists()


def test_none_is_written_where_none_is_wanted(tmp_path: Path) -> None:
    assert end(tmp_path / "a", nothing, LogSection(report=False)) == []
    assert not (tmp_path / "a/report.html").exists()


@pytest.mark.parametrize("act", [nothing, fail])
def test_a_page_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, act: Callable[[], None]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/lock").touch()
    (tmp_path / "a/report.html").mkdir()
    lines = end(tmp_path / "a", act)
    assert lines[0].startswith("warning: no report was written: ConfigError: out: ")
    assert lines[1:] == ([] if act is nothing else ["raised NumericsError"])
