"""Whether the folder of a run can be used, before anything is started."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf.config.commands import TrainConfig
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import local_folder
from rlhf.config.models import TrainedModelSection
from rlhf.config.problems import Problem
from rlhf.errors import ConfigError
from rlhf.orchestrator.run.run_directory import require_kind, require_unlocked, require_writable

LEAST_BYTES = 16 * 2**20
"""Room for records and logs."""
STATES_PER_WEIGHT = 3
"""A checkpoint holds at least the weights of a trained model and two moments of the optimizer, in its own precision or
a higher one."""


def folder_of(config: TrainConfig) -> Path:
    """The folder of a run, absolute: workers write to it too, and may have another working directory."""
    return Path(config.run.dir, config.run.name).absolute()


def folder_problems(config: TrainConfig) -> Iterator[Problem]:
    """The folder is that of a run that no other driver uses, and has a checkpoint exactly if the run resumes."""
    try:
        require_unlocked(folder_of(config))
        require_kind(folder_of(config), config.checkpoint.resume)
    except ConfigError as error:
        yield Problem(keys=("run.dir", "run.name", "checkpoint.resume"), text=f"{str(error).rstrip('.')}.")


def require_folder(config: TrainConfig, environ: Mapping[str, str]) -> None:
    """Raise CheckpointError if the folder cannot be written, or its disk has no room for one checkpoint."""
    require_writable(folder_of(config), needed_room(config, environ))


def needed_room(config: TrainConfig, environ: Mapping[str, str]) -> int:
    """Bytes that a run needs at least on the disk of its folder."""
    return LEAST_BYTES + least_checkpoint_bytes(config, environ)


def least_checkpoint_bytes(config: TrainConfig, environ: Mapping[str, str]) -> int:
    """Bytes that a checkpoint of a run takes at least, by the files of the models that it trains."""
    size = 0
    for section in config.models.values():
        if section.model is None or not isinstance(section, TrainedModelSection) or section.lora.rank:
            continue
        try:
            folder = local_folder(section.model, environ)
        except ModelFileError:
            continue
        files = [] if folder is None else folder.glob("*.safetensors")
        size += STATES_PER_WEIGHT * sum(file.stat().st_size for file in files if file.is_file())
    return size
