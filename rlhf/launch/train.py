"""`rlhf train`: what a run reads and writes, opened once; what can be lost on the way is in `attempts`."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rlhf.actors.cluster import Cluster
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm
from rlhf.config.commands import OnlineConfig, PpoConfig, TrainConfig
from rlhf.config.data import DataSection
from rlhf.config.loading.load import dump_config, short_summary
from rlhf.config.model_files import ModelFacts, ModelFileError, describe_model
from rlhf.engines.base import Tokenizer
from rlhf.engines.models.loading import require_known_kind
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.rewards import row_problems
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.launch.assembly import (
    Data,
    first_role,
    run_length,
    tricks,
)
from rlhf.launch.attempts import Training
from rlhf.launch.check import refusal
from rlhf.launch.class_weights import weigh_classes
from rlhf.launch.model_checks import misfits
from rlhf.orchestrator.data import (
    DataSplit,
    load_demonstrations,
    load_labeled,
    load_preferences,
    load_prompts,
    load_steps,
    load_texts,
)
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.console import Console
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.recovery import run_with_restarts
from rlhf.orchestrator.run.resume import ResumePoint, find_resume_point
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.run.trackers import make_trackers, numbers, require_trackers
from rlhf.planning.roles import model_of
from rlhf.types import ScoredGroup

Loader = Callable[[DataSection, Tokenizer], DataSplit[ScoredGroup]]
OFFLINE_LOADERS: Mapping[str, Loader] = {
    "sft": load_demonstrations,
    "rm": load_preferences,
    "prm": load_steps,
    "dpo": load_preferences,
    "kto": load_labeled,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A run that reached its last step."""

    run_dir: Path
    model: Path
    """Folder of the trained model in Hugging Face format."""
    step: int
    """The last optimizer step."""
    metrics: Mapping[str, float]
    """Those of the last step, by the names in metrics.jsonl."""


def run_training(command: str, config: TrainConfig, open_console: Callable[[int], Console]) -> TrainResult:
    """Train a model by `command` (ppo, dpo, ...) with a resolved config. Starts Ray and leaves it again.

    `open_console` gets the number of steps and gives what shows the progress; it is closed at the end.

    Raises:
        RlhfError: the run failed; its class says how.
        PreemptedError: the run was asked to stop. What it saved can be resumed.
    """
    algorithm = build_algorithm(config.algo)
    require_trackers(config.log)
    require_models(config)
    tokenizer = load_tokenizer(trained_model(config, algorithm), key=f"{first_role(algorithm)}.model")
    data = load_data(command, config, tokenizer)
    require_rows(config, data)
    length = run_length(config, data)
    # Absolute: the actors that write here may run in another folder.
    folder = Path(config.run.dir, config.run.name).absolute()
    resume = config.checkpoint.resume
    with (
        RunDirectory.open(folder, resume=resume) as directory,
        closing(open_console(length.num_steps)) as console,
    ):
        fresh = RunState(
            step=0,
            seed=config.run.seed,
            ranks={role: config.models[role.value].num_ranks for role in algorithm.needs.trains},
            config=config.model_dump(mode="json"),
            data_fingerprint=data.fingerprint,
        )
        console.say(f"rlhf train {command}: {length.num_steps} steps into {folder}")
        console.say(short_summary(config))
        checkpoints = Checkpoints(directory.checkpoints, keep=config.checkpoint.keep, warn=console.say)
        resume_from = resume_point(config, directory, checkpoints, fresh, length) if resume else None
        directory.write_config(dump_config(config))
        trackers = make_trackers(
            config.log,
            metrics_path=directory.metrics,
            tensorboard_folder=directory.tensorboard,
            name=config.run.name,
            config=fresh.config,
            warn=console.say,
        )
        records = Records(directory, trackers, console, config.log, length.num_steps, tricks(config))
        stop = StopRequest(config.checkpoint.grace_s)
        with records.noting_failure():
            started = Cluster(config.cluster, f"rlhf-{config.run.name}", directory.log_folder)
        with started as cluster, stop.listening(), records.open():
            training = Training(
                command=command,
                config=config,
                data=data,
                tokenizer=tokenizer,
                length=length,
                cluster=cluster,
                records=records,
                checkpoints=checkpoints,
                stop=stop,
                fresh=fresh,
                algorithm=config.algo if data.groups is None else weigh_classes(config.algo, data.groups.train),
            )
            run_with_restarts(
                training,
                resume_from,
                checkpoints=checkpoints,
                max_restarts=config.cluster.max_restarts,
                stop=stop,
                note=records.note,
            )
        return TrainResult(
            run_dir=directory.path,
            model=directory.model,
            step=length.num_steps,
            metrics=last_metrics(directory.metrics),
        )


def last_metrics(path: Path) -> dict[str, float]:
    """The metrics of the last step in a metrics.jsonl; empty where a full disk left none."""
    rows = read_rows(path)
    return {name: value for name, value in numbers(rows[-1] if rows else {}).items() if name not in ("step", "time")}


def trained_model(config: TrainConfig, algorithm: Algorithm) -> str:
    """The model whose tokenizer the run speaks."""
    role = first_role(algorithm)
    return model_of(config.models[role.value], role)


def require_models(config: TrainConfig) -> None:
    """Refuse models that cannot be started together, as far as their small files say, which are fetched from the hub
    where they are not here.

    Raises:
        ModelError: one is not there, or of an unknown kind, or cannot read the tokens of another.
        ConfigError: one is not for sequences as long as these.
    """
    facts: dict[str, ModelFacts | None] = {}
    problems: list[str] = []
    classes: set[type[ConfigError]] = set()
    for role, section in config.models.items():
        if section.model is None or section.model in facts:
            continue
        facts[section.model] = None
        try:
            facts[section.model] = describe_model(require_known_kind(section, section.model, where=f"{role}.model"))
        except ModelError as error:
            problems += error.problems
            classes.add(ModelError)
        except ModelFileError as error:
            problems.append(f"{role}.model: {error}")
            classes.add(ModelError)
    for misfit in misfits(config, facts):
        problems.append(f"{', '.join(misfit.keys)}: {misfit.text}")
        classes.add(misfit.error)
    if problems:
        raise refusal(problems, classes)


def load_data(command: str, config: TrainConfig, tokenizer: Tokenizer) -> Data:
    """Read, check and tokenize every row. Raises DataError."""
    if not isinstance(config, OnlineConfig):
        return Data(groups=OFFLINE_LOADERS[command](config.data, tokenizer))
    prompts = load_prompts(config.data, tokenizer, config.rollout.max_prompt_tokens)
    rows = ((prompt.id, prompt.label, prompt.metadata) for prompt in (*prompts.train, *prompts.held_out))
    if unfit := row_problems(config.reward.all_sources, rows):
        raise DataError(unfit)
    texts = None
    if isinstance(config, PpoConfig) and config.algo.ptx_path is not None and config.algo.ptx_coef > 0:
        section = DataSection(path=config.algo.ptx_path, max_tokens=config.data.max_tokens, overlong="truncate")
        texts = load_texts(section, tokenizer)
    return Data(prompts=prompts, texts=texts)


def require_rows(config: TrainConfig, data: Data) -> None:
    """Refuse data that one step would go through more than once.

    Raises:
        DataError: there are fewer rows than a step reads.
    """
    if isinstance(config, OnlineConfig) and data.prompts is not None:
        data.prompts.require(config.rollout.batch_size, "rollout.batch_size")
    elif data.groups is not None:
        data.groups.require(config.train.batch_size, "train.batch_size")


def resume_point(
    config: TrainConfig, directory: RunDirectory, checkpoints: Checkpoints, fresh: RunState, length: RunLength
) -> ResumePoint:
    """The checkpoint to continue from; found before anything starts."""
    return find_resume_point(
        checkpoints,
        fresh,
        num_steps=length.num_steps,
        status=directory.read_status(),
        accepted=config.checkpoint.accept_change,
    )
