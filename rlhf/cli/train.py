"""`rlhf train`: the composition root. The one place that knows every class, and joins them into a run."""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rlhf.actors.cluster import Cluster
from rlhf.actors.launch import Crew, Launcher
from rlhf.actors.workers import SyncSpec
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm, Needs
from rlhf.cli.assembly import (
    Data,
    assemble_offline,
    assemble_online,
    course,
    first_role,
    run_length,
    trainee,
    tricks,
)
from rlhf.cli.casting import cast
from rlhf.cli.class_weights import weigh_classes
from rlhf.cli.foresight import foreseen
from rlhf.cli.stored_reference import fill_store, open_store, without_reference
from rlhf.config.commands import OnlineConfig, PpoConfig, TrainConfig
from rlhf.config.data import DataSection
from rlhf.config.load import dump_config, short_summary
from rlhf.engines.base import Tokenizer
from rlhf.engines.rewards import row_problems
from rlhf.engines.tokenizer import load_tokenizer
from rlhf.errors import DataError
from rlhf.orchestrator.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.console import make_console
from rlhf.orchestrator.data import (
    DataSplit,
    load_demonstrations,
    load_labelled,
    load_preferences,
    load_prompts,
    load_steps,
    load_texts,
)
from rlhf.orchestrator.loop import Loop
from rlhf.orchestrator.preemption import StopRequest
from rlhf.orchestrator.records import Records
from rlhf.orchestrator.resume import ResumePoint, find_resume_point
from rlhf.orchestrator.run_directory import RunDirectory, Status
from rlhf.orchestrator.schedule import RunLength
from rlhf.orchestrator.trackers import make_trackers, require_trackers
from rlhf.planning.placement import Placement
from rlhf.planning.roles import model_of, place
from rlhf.types import ScoredGroup

Loader = Callable[[DataSection, Tokenizer], DataSplit[ScoredGroup]]
OFFLINE_LOADERS: Mapping[str, Loader] = {
    "sft": load_demonstrations,
    "rm": load_preferences,
    "prm": load_steps,
    "dpo": load_preferences,
    "kto": load_labelled,
}


def run_training(command: str, config: TrainConfig) -> int:
    """Run `rlhf train COMMAND` with a resolved config. Returns the exit code; errors are raised as RlhfErrors."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rlhf").setLevel(logging.INFO)
    algorithm = build_algorithm(config.algo)
    require_trackers(config.log)
    tokenizer = load_tokenizer(trained_model(config, algorithm), key=f"{first_role(algorithm)}.model")
    data = load_data(command, config, tokenizer)
    if data.groups is not None:
        algorithm = build_algorithm(weigh_classes(config.algo, data.groups.train))
    length = run_length(config, data)
    # Absolute: the actors that write here may run in another folder.
    folder = Path(config.run.dir, config.run.name).absolute()
    with RunDirectory.open(folder, resume=config.checkpoint.resume) as directory:
        fresh = RunState(
            step=0,
            seed=config.run.seed,
            ranks={role: config.models[role.value].num_ranks for role in algorithm.needs.trains},
            config=config.model_dump(mode="json"),
            data_fingerprint=data.fingerprint,
        )
        console = make_console(sys.stdout, length.num_steps)
        console.say(f"rlhf train {command}: {length.num_steps} steps into {folder}")
        console.say(short_summary(config))
        checkpoints = Checkpoints(directory.checkpoints, keep=config.checkpoint.keep, warn=console.say)
        resume_from = resume_point(config, directory, checkpoints, fresh, length) if config.checkpoint.resume else None
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
        started = Cluster(config.cluster, f"rlhf-{config.run.name}", directory.log_folder)
        with shown_failure(records), started as cluster, stop.listening():
            store = open_store(config, data.groups, tokenizer, length.num_steps, cluster.device, records)
            needs = without_reference(algorithm.needs) if store is not None and store.is_complete else algorithm.needs
            placement = place(config, needs)
            for line in foreseen(command, config, needs, cluster):
                console.say(line)
            crew = start(config, needs, cluster, placement, length)
            for line in describe(crew, placement, cluster.device):
                console.say(line)
            with tempfile.TemporaryDirectory(dir=directory.path, prefix="trial-") as trial:
                trainee(config, crew, first_role(algorithm)).prove_export(Path(trial))
            if store is not None and not store.is_complete:
                crew = fill_store(store, config, cluster, crew, records, stop)
            if isinstance(config, OnlineConfig):
                parts = assemble_online(config, algorithm, data, crew, placement, tokenizer, stop)
            else:
                assert data.groups is not None
                parts = assemble_offline(command, config, algorithm, data.groups, crew, store)
            loop = Loop(parts, course(config, length), records=records, checkpoints=checkpoints, stop=stop, fresh=fresh)
            loop.run(resume_from)
    return 0


@contextmanager
def shown_failure(records: Records) -> Iterator[None]:
    """Leave no panel on the screen and no run that looks alive when something fails before the loop begins."""
    try:
        yield
    except BaseException as error:
        if not records.closed:
            records.status(Status.FAILED, 0, error=f"{type(error).__name__}: {error}")
            records.close()
        raise


def trained_model(config: TrainConfig, algorithm: Algorithm) -> str:
    """The model whose tokenizer the run speaks."""
    role = first_role(algorithm)
    return model_of(config.models[role.value], role)


def load_data(command: str, config: TrainConfig, tokenizer: Tokenizer) -> Data:
    """Read, check and tokenise every row. Raises DataError."""
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


def start(
    config: TrainConfig,
    needs: Needs,
    cluster: Cluster,
    placement: Placement,
    length: RunLength,
) -> Crew:
    """Start every actor, and bring the policy and the engines together."""
    updates = {role: length.num_updates(role) for role in needs.trains}
    script = cast(config, needs, placement, updates, cluster.device)
    launcher = Launcher(
        cluster,
        start_timeout_s=config.cluster.start_timeout_s,
        collective_timeout_s=config.train.step_timeout_s,
    )
    crew = launcher.launch(placement, script)
    if script.engine is not None:
        rollout = script.engine.section
        spec = SyncSpec(
            backend=script.engine.sync_backend,
            dtype=script.engine.dtype,
            engines=crew.engines,
            num_receivers=rollout.num_engines * rollout.tensor_parallel_size,
            bucket_bytes=int(rollout.sync_bucket_mib * 2**20),
            timeout_s=rollout.sync_timeout_s,
        )
        launcher.connect(crew, spec)
    return crew


def describe(crew: Crew, placement: Placement, device: str) -> list[str]:
    """Who runs where."""
    lines = [f"{placement.num_devices} devices ({device}) in {len(placement.groups)} groups"]
    workers = [worker for group in dict.fromkeys(crew.groups.values()) for worker in group.workers]
    lines += [f"  {worker}" for worker in (*workers, *crew.engines, *crew.rewards.values())]
    return lines
