"""From a config to the roles of a run: which models are started, and on how many devices."""

import os
from collections.abc import Callable, Mapping, Sequence

from rlhf.algorithms.needs import Needs
from rlhf.config.algo import CustomSection
from rlhf.config.commands import METHODS, OnlineConfig, TrainConfig, method_name
from rlhf.config.fields import sections_in
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import described_folder, read_config_json
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.config.reward import StartedSource
from rlhf.config.rollout import RolloutSection
from rlhf.errors import ConfigError, ModelError
from rlhf.planning.model_shape import ModelShape, model_shape
from rlhf.planning.placement import Placement, Shape, plan_placement
from rlhf.types import Role, Signal

Finder = Callable[[str, str], Mapping[str, object]]
"""The config.json of a model, and the place that errors about it begin with."""


def reward_model(config: TrainConfig) -> StartedSource | None:
    """The reward model among an online run's sources."""
    models = [source for source in config.reward_sources if isinstance(source, StartedSource)]
    if len(models) > 1:
        raise ConfigError(f"reward.sources: one reward model at most (got {len(models)}); serve the others over HTTP.")
    return models[0] if models else None


def require_sections(config: TrainConfig, needs: Needs) -> None:
    """Raises ConfigError where an algorithm needs a model that its method's config has no section for."""
    name = method_name(config)
    for role in needs.trains:
        if not isinstance(config.models.get(role.value), TrainedModelSection):
            others = [f"`rlhf train {other} --algo custom`" for other in _custom_methods(role) if other != name]
            advice = f"Run it as {' or '.join(others)}." if others else "Train the policy, or policy and critic."
            raise ConfigError(f"algo.algorithm: it trains the {role}, which `rlhf train {name}` cannot. {advice}")
    if Signal.REF_LOG_PROBS in needs.signals and Role.REFERENCE.value not in config.models:
        raise ConfigError("algo.reference: the algorithm needs ref_log_probs. Set it to true.")


def _custom_methods(role: Role) -> list[str]:
    """The methods that can train `role` by an algorithm of the user's own."""
    return [
        name
        for name, method in METHODS.items()
        if CustomSection in sections_in(method.config.model_fields["algo"].annotation)
        and role.value in method.config.model_fields
        and isinstance(method.config.model_fields[role.value].default, TrainedModelSection)
    ]


def sections(config: TrainConfig, needs: Needs) -> dict[Role, ModelSection]:
    """The models that this run starts, by role; those that learn come first. Raises ConfigError if the config has no
    section for one."""
    require_sections(config, needs)
    started = {role: config.models[role.value] for role in needs.trains}
    if Signal.REF_LOG_PROBS in needs.signals and needs.ema_reference is None:
        started[Role.REFERENCE] = config.models[Role.REFERENCE.value]
    if (source := reward_model(config)) is not None:
        started[Role.REWARD] = source
    return started


def place(config: TrainConfig, needs: Needs) -> Placement:
    """The device groups of the run. Raises ConfigError if merged roles do not fit together."""
    rollout = config.rollout if isinstance(config, OnlineConfig) else None
    return place_models(sections(config, needs), rollout, config.cluster.colocate)


def place_models(
    models: Mapping[Role, ModelSection], rollout: RolloutSection | None, colocate: Sequence[str]
) -> Placement:
    """The device groups of some models and engines. Raises ConfigError if merged roles do not fit together."""
    shapes = {
        role: Shape(num_nodes=section.num_nodes, num_devices_per_node=section.num_gpus_per_node)
        for role, section in models.items()
    }
    if rollout is None:
        return plan_placement(shapes, colocate)
    nodes = rollout.num_nodes_per_engine
    shapes[Role.ROLLOUT] = Shape(
        num_nodes=rollout.num_engines * nodes, num_devices_per_node=rollout.devices_per_engine // nodes
    )
    return plan_placement(shapes, colocate, num_engines=rollout.num_engines, nodes_per_engine=nodes)


def model_of(section: ModelSection, role: Role) -> str:
    """The model that a role loads."""
    if section.model is None:
        raise ConfigError(f"{role}.model: not given.")
    return section.model


def shapes_of(config: TrainConfig, needs: Needs, find: Finder) -> dict[Role, ModelShape]:
    """The size of every model that the run starts. Raises ModelError."""
    models = {role: model_of(section, role) for role, section in sections(config, needs).items()}
    known: dict[str, ModelShape] = {}
    for role, model in models.items():
        if model not in known:
            known[model] = model_shape(f"{role}.model", find(model, f"{role}.model"))
    return {role: known[model] for role, model in models.items()}


def local_config_json(model: str, where: str) -> Mapping[str, object]:
    """A model's config.json from its folder, or from the hub's cache. Raises ModelError."""
    try:
        folder = described_folder(model, os.environ)
        if folder is None:
            raise ModelError(f"{where}: {model} is not here.")
        return read_config_json(folder)
    except ModelFileError as error:
        raise ModelError(f"{where}: {error}") from error
