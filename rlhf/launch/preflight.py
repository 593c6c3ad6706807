"""`rlhf check` beyond the config: the same as `rlhf train` does before it starts Ray, and what was not looked at."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlhf.algorithms.needs import needs_of
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import described_folder
from rlhf.errors import ConfigError
from rlhf.importing import importing
from rlhf.launch.check import data_files, data_notes, is_quick, try_user_code, why_not_read
from rlhf.launch.findings import Findings
from rlhf.launch.run_folder import folder_of
from rlhf.launch.services import services_of, starts_ray_here
from rlhf.orchestrator.data import load
from rlhf.orchestrator.run.run_directory import require_unlocked
from rlhf.planning.roles import require_sections
from rlhf.terminal import counted

if TYPE_CHECKING:
    from rlhf.launch.episode_trial import EpisodeTrial
    from rlhf.launch.prepare import Gathered

MAX_ROWS = 2000
"""Rows that a check tokenizes: of more it takes so many, evenly spaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a check found out."""

    tried: Sequence[str]
    """A line for each reward function: one row with its scores."""
    looked_at: Sequence[str]
    not_looked_at: Sequence[str]
    episode: "EpisodeTrial | None" = None
    """A run with tools or an environment: one response, of a scripted policy."""


def preflight(config: TrainConfig, environ: Mapping[str, str]) -> Preflight:
    """Do with a checked config what a run does before it starts Ray, as far as its files are on this machine.

    Raises:
        ConfigError, DataError, ModelError, RewardError: the run cannot start, with the words of the run itself.
    """
    require_unlocked(folder_of(config))
    found = Findings()
    looked, unseen = ["settings", "run folder"], ["memory (`rlhf plan`)"]
    unseen += [] if starts_ray_here(config, environ) else ["the cluster's devices, and what its nodes can reach"]
    missing = missing_models(config, environ)
    if not can_load():
        tried = try_user_code(config, found)
        found.settle()
        unseen.append("models and the length of rows: pip install 'rlhf[cpu]' or 'rlhf[gpu]' to train here")
        return Preflight(tried=tried, looked_at=looked, not_looked_at=unseen)
    # What reads models and tokenizers comes with the training libraries.
    with importing():
        from rlhf.launch.devices import describe_devices  # noqa: PLC0415
        from rlhf.launch.prepare import Scope, gather, require_same_run  # noqa: PLC0415

    needs = needs_of(config.algo)
    require_sections(config, needs)
    is_read = not missing and is_quick(config, data_files(config)[0])
    with loading_quietly(frozenset(data_notes(config)).__contains__):
        run = gather(config, needs, found, Scope(models=not missing, rows=is_read, max_rows=MAX_ROWS))
    found.settle()
    looked += [] if missing else ["models"]
    looked += [describe_devices(config, needs), *services_of(config)]
    is_sample = False
    if run.data is not None:
        num_rows = run.data.num_looked_at
        is_sample = num_rows >= MAX_ROWS
        looked.append(f"{counted(num_rows, 'row')}{', evenly spaced,' if is_sample else ''} with the tokenizer")
        unseen += ["the length of the other rows"] if is_sample else []
    elif missing:
        unseen.append(f"models and the length of rows: {', '.join(missing)} will be downloaded")
    else:
        unseen.append(why_not_read(config))
    if config.checkpoint.resume:
        fingerprint = None if run.data is None or is_sample else run.data.fingerprint
        require_same_run(config, needs, fingerprint)
        looked.append("the settings of the newest checkpoint")
        unseen.append("whether that checkpoint is whole")
    episode = _episode(config, run)
    looked += [] if episode is None else ["one episode of a scripted policy"]
    return Preflight(tried=run.tried, looked_at=looked, not_looked_at=unseen, episode=episode)


def _episode(config: TrainConfig, run: "Gathered") -> "EpisodeTrial | None":
    """An episode on the first row, where responses have several turns and rows were read."""
    if not isinstance(config, OnlineConfig) or run.tokenizer is None or run.data is None:
        return None
    if run.data.world is None or run.data.prompts is None:
        return None
    from rlhf.launch.episode_trial import try_episode  # noqa: PLC0415  comes with the training libraries

    return try_episode(
        config.rollout,
        run.data.world,
        run.tokenizer,
        run.data.prompts.train[0],
        max_tokens=config.train.max_tokens_per_micro_batch,
    )


def can_load() -> bool:
    """Whether the libraries that read models and tokenizers are installed."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


@contextmanager
def loading_quietly(said: Callable[[str], bool] = lambda line: True) -> Iterator[None]:
    """Loading rows logs notes about them: leave out those that were said elsewhere, by default all."""

    def is_new(record: logging.LogRecord) -> bool:
        return not said(record.getMessage())

    loader = logging.getLogger(load.__name__)
    loader.addFilter(is_new)
    try:
        yield
    finally:
        loader.removeFilter(is_new)


def missing_models(config: TrainConfig, environ: Mapping[str, str]) -> list[str]:
    """Models that are not on this machine, each once."""
    names = dict.fromkeys(section.model for section in config.models.values() if section.model is not None)
    try:
        return [name for name in names if described_folder(name, environ) is None]
    except ModelFileError as error:
        raise ConfigError(str(error)) from error
