"""Everything of a run that comes before its folder and Ray: what `rlhf train` does first, and `rlhf check` does too."""

from dataclasses import dataclass

from rlhf.algorithms.needs import Needs, needs_of
from rlhf.config.commands import TrainConfig
from rlhf.engines.base import Tokenizer
from rlhf.launch.data import RunData, load_data
from rlhf.launch.devices import require_devices
from rlhf.launch.models import load_run_tokenizer, require_models
from rlhf.launch.schedule import run_length
from rlhf.launch.services import require_services
from rlhf.orchestrator.run.checkpoint import RunState
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


def prepare(config: TrainConfig, max_rows: int | None = None) -> Prepared:
    """Check sections, trackers, models, devices and services, then read, check and tokenize the rows, and call the
    reward functions on the first ones.

    With `max_rows`, of more rows only so many, evenly spaced, are tokenized, and transformers is not imported for a
    tokenizer whose files need none of it; such a run is not to be started.

    Raises:
        ConfigError, DataError, ModelError, RewardError: it cannot start.
    """
    needs = needs_of(config.algo)
    require_sections(config, needs)
    require_trackers(config.log)
    require_models(config)
    require_devices(config, needs)
    require_services(config)
    tokenizer = load_run_tokenizer(config, needs, plain=max_rows is not None)
    data = load_data(config, tokenizer, max_rows)
    return Prepared(
        needs=needs,
        tokenizer=tokenizer,
        data=data,
        length=run_length(config, data.num_rows),
        fresh=initial_state(config, needs, data.fingerprint),
    )


def initial_state(config: TrainConfig, needs: Needs, data_fingerprint: str) -> RunState:
    """The state of a run before its first step."""
    return RunState(
        step=0,
        seed=config.run.seed,
        ranks={role: config.models[role.value].num_ranks for role in needs.trains},
        config=config.model_dump(mode="json"),
        data_fingerprint=data_fingerprint,
    )
