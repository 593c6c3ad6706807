"""The page that a run leaves in its folder when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.config.run import LogSection
from rlhf.errors import PreemptedError
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.report.run_record import read_run
from rlhf.report.write import write_report


@contextmanager
def report_at_end(section: LogSection, directory: RunDirectory, console: Console) -> Iterator[None]:
    """When what is inside ends or fails, write the run's page and say where it is; at a good end, its verdict too. A
    run that was asked to stop gets no page: it has little time, and continues later."""
    try:
        yield
    except PreemptedError:
        raise
    except Exception:
        # Its error, which the verdict repeats, is shown by the command.
        for line in leave_report(section, directory)[-1:]:
            console.say(line)
        raise
    for line in leave_report(section, directory):
        console.say(line)


def leave_report(section: LogSection, directory: RunDirectory) -> list[str]:
    """Write the page, where the config asks for one. Returns what to say: the verdict, and last where the page is or
    why there is none. No failure of a report is a failure of its run."""
    if not section.report:
        return []
    try:
        lines = write_report([read_run(directory.path)], directory.report)
    except Exception as error:
        return [f"warning: no report was written: {type(error).__name__}: {error}"]
    return [*lines, f"report: {directory.report}"]
