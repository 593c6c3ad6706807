"""A training run from its config to its model: check, data, run directory, attempts."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf.actors.cluster import Cluster
from rlhf.actors.stragglers import Stragglers
from rlhf.actors.waiting import CallObserver
from rlhf.config.commands import TrainConfig, method_name
from rlhf.config.loading.load import dump_config, short_summary
from rlhf.config.run import CheckpointSection
from rlhf.engines.process.hub_retries import telling_hub_retries
from rlhf.engines.process.repairs import RepairLog
from rlhf.errors import WorkerLostError
from rlhf.launch.attempts import RunAttempts
from rlhf.launch.class_weights import weigh_classes
from rlhf.launch.end_report import report_at_end
from rlhf.launch.fork_ahead import forking_ahead
from rlhf.launch.prepare import Prepared, prepare
from rlhf.launch.records import make_records
from rlhf.launch.run_folder import folder_of
from rlhf.launch.shown_waits import ShownWaits
from rlhf.launch.trained_model import remember_prompts
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.recovery import run_with_restarts
from rlhf.orchestrator.run.resume import ResumePoint, find_resume_point
from rlhf.orchestrator.run.run_directory import RunDirectory, require_unlocked
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.run.trackers import numbers
from rlhf.terminal import counted, tell

START_OF_RAY = "start of Ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A run that reached its last step."""

    run_dir: Path
    model: Path
    """Folder of the trained model in Hugging Face format."""
    step: int
    """The last optimizer step."""
    metrics: Mapping[str, float]
    """The metrics of the last step, by their names in metrics.jsonl."""


def run_training(
    config: TrainConfig,
    open_console: Callable[[int], Console],
    observers: Sequence[CallObserver] = (),
) -> TrainResult:
    """Train a model with a resolved config. Starts Ray and leaves it again.

    `open_console` takes the number of steps and returns what shows the progress, which is closed at the end.
    `observers` see every wait for a remote call.

    Raises:
        RlhfError: the run failed; its class says how.
        PreemptedError: the run was asked to stop. What it saved can be resumed.
    """
    require_unlocked(folder_of(config))  # known at once, and rows take long to read
    with forking_ahead(config):
        return run_unlocked(config, open_console, observers)


def run_unlocked(
    config: TrainConfig, open_console: Callable[[int], Console], observers: Sequence[CallObserver]
) -> TrainResult:
    """As `run_training`, in a folder that no other run holds."""
    downloads = RepairLog()
    with telling_hub_retries(downloads.add):
        prepared = prepare(config)
    length = prepared.length
    with (
        RunDirectory.open(folder_of(config), resume=config.checkpoint.resume) as directory,
        closing(open_console(length.num_steps)) as console,
    ):
        say_start(console, config, length)
        records = make_records(config, directory, console, length.num_steps, downloads.take())
        checkpoints = Checkpoints(
            directory.checkpoints, keep=config.checkpoint.keep, warn=records.warn, repaired=records.repair
        )
        resume_from = resume_point(config.checkpoint, directory, checkpoints, prepared.fresh, length.num_steps)
        if resume_from is not None and resume_from.is_end:
            console.say(f"resume: step {length.num_steps} is done and the model exported: nothing is left to do")
            return result_of(directory, length.num_steps)
        write_settings(directory, config, prepared.data.template)
        stop = StopRequest(config.checkpoint.grace_s)
        with (
            stop.listening(),
            report_at_end(config.log, directory, console),
            open_cluster(config, records, console, observers, stop) as cluster,
            records.open(),
            stop.naming_interruptions(),
        ):
            attempts = make_attempts(config, prepared, cluster, records, checkpoints, stop)
            attempts.keep_token_limit(resume_from)
            run_with_restarts(
                attempts,
                resume_from,
                checkpoints=checkpoints,
                max_restarts=config.cluster.max_restarts,
                stop=stop,
                repaired=records.repair,
            )
        return result_of(directory, length.num_steps)


def make_attempts(
    config: TrainConfig,
    prepared: Prepared,
    cluster: Cluster,
    records: Records,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> RunAttempts:
    """The attempts of a run, of which none has started."""
    groups = prepared.data.groups
    return RunAttempts(
        config=config,
        algorithm=config.algo if groups is None else weigh_classes(config.algo, groups.train),
        data=prepared.data,
        tokenizer=prepared.tokenizer,
        length=prepared.length,
        cluster=cluster,
        records=records,
        checkpoints=checkpoints,
        stop=stop,
        fresh=prepared.fresh,
    )


def write_settings(directory: RunDirectory, config: TrainConfig, template: str) -> None:
    """Save the config and how rows became prompts: what `rlhf generate` asks a run for."""
    directory.write_config(dump_config(config))
    remember_prompts(directory.path, template)


def say_start(console: Console, config: TrainConfig, length: RunLength) -> None:
    """Say what is trained, and with which settings."""
    console.say(f"rlhf train {method_name(config)}: {counted(length.num_steps, 'step')} into {folder_of(config)}")
    for line in short_summary(config).splitlines():
        console.say(line)


def open_cluster(
    config: TrainConfig, records: Records, console: Console, observers: Sequence[CallObserver], stop: StopRequest
) -> Cluster:
    """Join or start Ray. A failure is recorded in the run directory; the console shows every wait."""
    log_folder = records.directory.log_folder
    shown = ShownWaits(console.waiting, log_folder)
    console.waiting(START_OF_RAY, ["Ray"])
    with records.recording_failure(), stop.naming_interruptions():
        cluster = Cluster(
            config.cluster,
            f"rlhf-{config.run.name}",
            log_folder,
            observers=[Stragglers(records.warn), shown, *observers],
            on_lost=partial(end_at_once, records),
            repaired=records.repair,
        )
    console.waiting(START_OF_RAY, [])
    return cluster


def end_at_once(records: Records, error: WorkerLostError) -> None:
    """Record that Ray's control store is gone as the end of the run, and end this process: nothing that needs Ray can
    be closed any more."""
    try:
        records.end(error)
        tell([f"rlhf: error: {error}. Continue with --resume."])
    finally:
        os._exit(error.exit_code)


def result_of(directory: RunDirectory, num_steps: int) -> TrainResult:
    """What a run of `num_steps` that reached its end left in its directory."""
    metrics = last_metrics(directory.metrics)
    return TrainResult(run_dir=directory.path, model=directory.model, step=num_steps, metrics=metrics)


def last_metrics(path: Path) -> dict[str, float]:
    """The metrics of the last step in a metrics.jsonl; empty if a full disk prevented writing it."""
    rows = read_rows(path)
    return {name: value for name, value in numbers(rows[-1] if rows else {}).items() if name not in ("step", "time")}


def resume_point(
    section: CheckpointSection, directory: RunDirectory, checkpoints: Checkpoints, fresh: RunState, num_steps: int
) -> ResumePoint | None:
    """The checkpoint to continue from, checked before anything starts; None for a new run."""
    if not directory.resumes:
        return None
    return find_resume_point(
        checkpoints,
        fresh,
        num_steps=num_steps,
        status=directory.read_status(),
        accepted=section.accept_change,
        resume=section.resume,
    )
