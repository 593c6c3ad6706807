"""In which settings runs differ."""

from collections.abc import Sequence

from rlhf.report.run_record import RunRecord
from rlhf.types import Json

ALWAYS_DIFFER = {"run.name", "run.dir", "checkpoint.resume"}
"""Settings that say which run it is, and nothing about what it did."""
MISSING = "(not set)"


def config_difference(runs: Sequence[RunRecord]) -> dict[str, list[Json]]:
    """Setting -> its value in each run, for each setting that is not the same in all; MISSING where a run does not have
    it. Runs whose config cannot be read are left out of the comparison, and have MISSING everywhere."""
    known = [run for run in runs if run.config]
    names = sorted({name for run in known for name in run.config} - ALWAYS_DIFFER)
    return {
        name: [run.config.get(name, MISSING) for run in runs]
        for name in names
        if any(run.config.get(name, MISSING) != known[0].config.get(name, MISSING) for run in known)
    }
