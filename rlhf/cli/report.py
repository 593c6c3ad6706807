"""`rlhf report`: write the page about one or several runs."""

from pathlib import Path

from rlhf.config.tools import ReportConfig
from rlhf.report.run_record import read_runs
from rlhf.report.write import write_report
from rlhf.terminal import tell, write_line


def run_report(config: ReportConfig) -> int:
    """Write the page, and print its path and the verdict. Returns the exit code.

    Raises:
        ConfigError: a folder is not a run's, or the file to write holds something else.
        DataError: a file cannot be read.
        CheckpointError: the page cannot be written.
    """
    runs = read_runs([Path(folder) for folder in config.runs])
    for run in runs:
        tell(f"rlhf: warning: {note}" for note in run.notes)
    path = Path(config.out) if config.out is not None else runs[0].folder / "report.html"
    if config.out is None and len(runs) > 1:
        path = Path("report.html")
    lines = write_report(runs, path, config.steps, int(config.responses_mib * 2**20))
    size = path.stat().st_size / 2**20
    for line in (*lines, f"report: {path.absolute()} ({size:.1f} MiB)"):
        write_line(line)
    return 0
