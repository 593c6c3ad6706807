"""Everything of a run that comes before its folder and Ray: what `rlhf train` does first, and `rlhf check` does too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rlhf.algorithms.needs import Needs, needs_of
from rlhf.config.commands import TrainConfig
from rlhf.engines.base import Tokenizer
from rlhf.launch.check import try_user_code
from rlhf.launch.data import RunData, load_data
from rlhf.launch.devices import require_devices
from rlhf.launch.findings import Findings
from rlhf.launch.models import load_run_tokenizer, require_models
from rlhf.launch.run_folder import folder_of
from rlhf.launch.schedule import run_length
from rlhf.launch.services import require_services
from rlhf.orchestrator.run import resume
from rlhf.orchestrator.run.checkpoint import RunState, peek
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.run.trackers import require_trackers
from rlhf.planning.roles import require_sections


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is known of a run before anything of it is started."""

    needs: Needs
    tokenizer: Tokenizer
    data: RunData
    length: RunLength
    fresh: RunState
    """The state of the run before its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What could be loaded of a run with which something may be wrong."""

    tokenizer: Tokenizer | None
    data: RunData | None
    tried: Sequence[str]
    """A line for each reward function, and one for tools and environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What of a run is looked at."""

    models: bool = True
    rows: bool = True
    max_rows: int | None = None
    """Of more rows only so many, evenly spaced, are tokenized; such a run is not to be started."""
    is_spoiled: Callable[[str], bool] = lambda key: False
    """Whether something is known to be wrong at a key, so that what follows from its value says nothing."""


def prepare(config: TrainConfig, max_rows: int | None = None) -> Prepared:
    """Check sections, trackers, models, devices and services, then read, check and tokenize the rows, and call the
    reward functions on the first ones. What is wrong with one of these does not hide what is wrong with the others.

    Raises:
        ConfigError, DataError, ModelError, RewardError: it cannot start.
    """
    needs = needs_of(config.algo)
    require_sections(config, needs)
    found = Findings()
    run = gather(config, needs, found, Scope(max_rows=max_rows))
    found.settle()
    assert run.tokenizer is not None, "it was loaded, or is found wrong"
    assert run.data is not None, "they were read, or are found wrong"
    data = run.data
    return Prepared(
        needs=needs,
        tokenizer=run.tokenizer,
        data=data,
        length=run_length(config, data.num_rows),
        fresh=initial_state(config, needs, data.fingerprint),
    )


def gather(config: TrainConfig, needs: Needs, found: Findings, scope: Scope) -> Gathered:
    """The tokenizer and the data of a run, where they are in scope. What is wrong with the run goes to `found`."""
    places = ("cluster", "rollout", *config.models)
    checks = [
        (("log",), partial(require_trackers, config.log)),
        (places, partial(require_devices, config, needs)),
        (("reward",), partial(require_services, config)),
    ]
    if scope.models:
        checks.insert(0, (tuple(config.models), partial(require_models, config)))
    for keys, check in checks:
        if not any(map(scope.is_spoiled, keys)):
            found.attempt(check)
    tokenizer, data = None, None
    tried: Sequence[str] = ()
    if scope.rows and not found.blames(f"{needs.exported_role}.model"):
        tokenizer = found.attempt(partial(load_run_tokenizer, config, needs))
    if tokenizer is not None:
        data = found.attempt(partial(load_data, config, tokenizer, scope.max_rows))
    else:
        tried = try_user_code(config, found, scope.is_spoiled)
    if found and config.checkpoint.resume:
        found.attempt(partial(require_same_run, config, needs, None))
    return Gathered(tokenizer=tokenizer, data=data, tried=tried if data is None else data.tried)


def require_same_run(config: TrainConfig, needs: Needs, data_fingerprint: str | None) -> None:
    """Raise ConfigError where the newest checkpoint is that of another run; without a fingerprint, of any rows."""
    saved = peek(folder_of(config) / "checkpoints")
    if saved is not None:
        accepted = (*config.checkpoint.accept_change, *(["data"] if data_fingerprint is None else []))
        resume.require_same_run(saved, initial_state(config, needs, data_fingerprint or ""), accepted)


def initial_state(config: TrainConfig, needs: Needs, data_fingerprint: str) -> RunState:
    """The state of a run before its first step."""
    return RunState(
        step=0,
        seed=config.run.seed,
        ranks={role: config.models[role.value].num_ranks for role in needs.trains},
        config=config.model_dump(mode="json"),
        data_fingerprint=data_fingerprint,
    )
