"""`rlhf check` beyond the config: the same as `rlhf train` does before it starts Ray, and what was not looked at."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from rlhf.config.commands import TrainConfig
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import described_folder
from rlhf.errors import ConfigError
from rlhf.importing import importing
from rlhf.launch.check import data_files, data_notes, is_quick, try_rewards, try_world
from rlhf.launch.run_folder import folder_of
from rlhf.launch.services import services_of, starts_ray_here
from rlhf.orchestrator.data import load
from rlhf.orchestrator.run.checkpoint import RunState, peek
from rlhf.orchestrator.run.resume import require_same_run
from rlhf.orchestrator.run.run_directory import require_unlocked
from rlhf.terminal import counted

MAX_ROWS = 2000
"""Rows that a check tokenizes: of more it takes so many, evenly spaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a check found out."""

    tried: Sequence[str]
    """A line for each reward function: one row with its scores."""
    looked_at: Sequence[str]
    not_looked_at: Sequence[str]


def preflight(config: TrainConfig, environ: Mapping[str, str]) -> Preflight:
    """Do with a checked config what a run does before it starts Ray, as far as its files are on this machine.

    Raises:
        ConfigError, DataError, ModelError, RewardError: the run cannot start, with the words of the run itself.
    """
    require_unlocked(folder_of(config))
    looked, unseen = ["settings", "run folder"], ["memory (`rlhf plan`)"]
    unseen += [] if starts_ray_here(config, environ) else ["the cluster's devices, and what its nodes can reach"]
    files, _ = data_files(config)
    missing = _missing_models(config, environ)
    is_installed = find_spec("torch") is not None and find_spec("transformers") is not None
    if missing or not is_installed or not is_quick(config, files):
        if not is_installed:
            unseen.append("models and the length of rows: pip install 'rlhf[cpu]' or 'rlhf[gpu]' to train here")
        elif missing:
            unseen.append(f"models and the length of rows: {', '.join(missing)} will be downloaded")
        else:
            looked.append("models' files")
            unseen.append("rows: only plain files up to 16 MiB are read; the run reads all before it starts anything")
        return Preflight(tried=[*try_rewards(config), *try_world(config)], looked_at=looked, not_looked_at=unseen)
    # What reads models and tokenizers comes with the training libraries.
    with importing():
        from rlhf.launch.devices import describe_devices  # noqa: PLC0415
        from rlhf.launch.prepare import prepare  # noqa: PLC0415

    with _without(data_notes(config)):
        prepared = prepare(config, MAX_ROWS)
    num_rows = prepared.data.num_looked_at
    is_sample = num_rows >= MAX_ROWS
    looked += ["models", describe_devices(config, prepared.needs), *services_of(config)]
    looked.append(f"{counted(num_rows, 'row')}{', evenly spaced,' if is_sample else ''} with the tokenizer")
    unseen += ["the length of the other rows"] if is_sample else []
    if config.checkpoint.resume:
        _require_same_run(config, prepared.fresh, is_sample=is_sample)
        looked.append("the settings of the newest checkpoint")
        unseen.append("whether that checkpoint is whole")
    return Preflight(tried=prepared.data.tried, looked_at=looked, not_looked_at=unseen)


@contextmanager
def _without(lines: Sequence[str]) -> Iterator[None]:
    """Loading rows logs notes about them; `lines` are left out, which a check shows with its findings."""
    said = frozenset(lines)

    def is_new(record: logging.LogRecord) -> bool:
        return record.getMessage() not in said

    loader = logging.getLogger(load.__name__)
    loader.addFilter(is_new)
    try:
        yield
    finally:
        loader.removeFilter(is_new)


def _missing_models(config: TrainConfig, environ: Mapping[str, str]) -> list[str]:
    """Models that are not on this machine, each once."""
    names = dict.fromkeys(section.model for section in config.models.values() if section.model is not None)
    try:
        return [name for name in names if described_folder(name, environ) is None]
    except ModelFileError as error:
        raise ConfigError(str(error)) from error


def _require_same_run(config: TrainConfig, fresh: RunState, *, is_sample: bool) -> None:
    """Raise ConfigError where the newest checkpoint is that of another run."""
    saved = peek(folder_of(config) / "checkpoints")
    if saved is not None:
        accepted = (*config.checkpoint.accept_change, *(["data"] if is_sample else []))
        require_same_run(saved, fresh, accepted)
