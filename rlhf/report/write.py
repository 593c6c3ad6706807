"""Writing the page of a report."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import ConfigError, DataError
from rlhf.orchestrator.run.files import write_text
from rlhf.report.chosen_responses import choose_responses
from rlhf.report.page import render
from rlhf.report.page_data import page_data
from rlhf.report.run_record import RunRecord, names_of

MARK = 'content="rlhf report"'
"""In the head of every page that was written here."""
READ_OF_HEAD = 4096


MAX_RESPONSE_BYTES = 2 * 2**20


def write_report(
    runs: Sequence[RunRecord], path: Path, steps: Sequence[int] = (), max_response_bytes: int = MAX_RESPONSE_BYTES
) -> list[str]:
    """Write the page about `runs`. Returns the lines that it begins with: which run did best, and each one's verdict.
    It holds all responses of `steps`, and others up to `max_response_bytes`.

    Raises:
        ConfigError: the file exists and is not a report, its folder does not exist, or a step is not recorded.
        DataError: a file of a run cannot be read.
        CheckpointError: the page cannot be written.
    """
    require_ours(path)
    names = names_of(runs)
    try:
        responses = choose_responses(runs, steps, max_response_bytes)
        shown = [
            [int(str(block["step"])) for block in responses if block["run"] == place] for place in range(len(runs))
        ]
        data = page_data(runs, names, shown)
    except OSError as error:
        file = error.filename or f"a file of {', '.join(names)}"
        raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error
    write_text(path, render(f"rlhf report: {', '.join(names)}", data.content, responses))
    return data.lines


def require_ours(path: Path) -> None:
    """Refuse to replace a file that is not a report. Raises ConfigError."""
    if not path.parent.is_dir():
        raise ConfigError(f"out: {path.parent} is not a folder. Make it first.")
    if path.is_dir():
        raise ConfigError(f"out: {path} is a folder. Name a file, as {path / 'report.html'}.")
    try:
        head = path.read_bytes()[:READ_OF_HEAD] if path.exists() else MARK.encode()
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be read ({error.strerror}). Choose another file.") from error
    if MARK.encode() not in head:
        raise ConfigError(f"out: {path} exists and is not a report. Choose another file.")
