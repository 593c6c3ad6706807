"""What a run writes: config, metrics, trackers, console."""

from rlhf.config.commands import TrainConfig
from rlhf.engines.base import Tracker
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.orchestrator.run.trackers import make_trackers


def make_records(config: TrainConfig, directory: RunDirectory, console: Console, num_steps: int) -> Records:
    """The records of a run in its directory, on the console and with the configured trackers."""

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
    return records
