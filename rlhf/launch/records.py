"""What a run writes: config, metrics, trackers, console."""

from collections.abc import Sequence

from rlhf.config.commands import TrainConfig
from rlhf.engines.base import Tracker
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.orchestrator.run.trackers import make_trackers
from rlhf.repair import Repair


def make_records(
    config: TrainConfig, directory: RunDirectory, console: Console, num_steps: int, repairs: Sequence[Repair]
) -> Records:
    """The records of a run in its directory, on the console and with the configured trackers. `repairs` were made
    before there were any."""

    def open_trackers() -> list[Tracker]:
        return make_trackers(
            config.log,
            metrics_path=directory.metrics,
            tensorboard_folder=directory.tensorboard,
            name=config.run.name,
            config=config.model_dump(mode="json"),
            warn=records.warn,
        )

    records = Records(directory, open_trackers, console, config.log, num_steps)
    for repair in repairs:
        records.repair(repair)
    return records
