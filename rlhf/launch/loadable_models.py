"""The models of a run as transformers knows them, asked before anything starts."""

from collections.abc import Iterator, Mapping

from rlhf.algorithms.needs import Needs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import ModelFacts, describe_model
from rlhf.config.models import TrainedModelSection
from rlhf.engines.models.adapters import require_targets
from rlhf.engines.models.checkpointing import checkpoint_layers
from rlhf.engines.models.chunked_mlp import chunk_feed_forward
from rlhf.engines.models.loading import WEIGHTS, inspect_model, require_supported_model
from rlhf.engines.models.router_replay import replayable_routers
from rlhf.engines.models.routers import checked_routers, num_chosen
from rlhf.errors import ModelError
from rlhf.launch.model_checks import head_of_role
from rlhf.types import Head, Role

Facts = Mapping[str, ModelFacts | None]


def examined(config: TrainConfig, needs: Needs) -> tuple[Facts, list[str]]:
    """What the small files of each model say, by its name, and a line for each problem: a model is missing, is of an
    unknown kind, or does not load. Small files that are not on this machine are downloaded from the hub."""
    facts: dict[str, ModelFacts | None] = {}
    problems: list[str] = []
    for role, section in config.models.items():
        if section.model is None or section.model in facts:
            continue
        facts[section.model] = None
        try:
            facts[section.model] = describe_model(
                require_supported_model(section, section.model, where=f"{role}.model")
            )
        except ModelError as error:
            problems += error.problems
        except ModelFileError as error:
            problems.append(f"{role}.model: {error}")
    return facts, [*problems, *_unusable(config, needs, facts)]


def _unusable(config: TrainConfig, needs: Needs, facts: Facts) -> Iterator[str]:
    """Why models that are on this machine do not load with the head that they get, or lack what is asked of them, a
    line for each problem."""
    seen: set[tuple[str, Head]] = set()
    for name, section in config.models.items():
        fact = facts.get(section.model or "")
        if section.model is None or fact is None:
            continue
        head, is_trained = head_of_role(name, section, needs, is_scorer=fact.num_labels == 1)
        if not any(fact.folder.glob(WEIGHTS)) or (section.model, head) in seen:
            continue
        seen.add((section.model, head))
        try:
            model = inspect_model(section, section.model, head, where=f"{name}.model", new_head=is_trained)
            if isinstance(section, TrainedModelSection) and section.lora.rank:
                require_targets(model, section.lora, f"{name}.lora.targets")
            checked_routers(model, section, f"{name}.model")
            if name == Role.POLICY and isinstance(config, OnlineConfig) and config.rollout.router_replay:
                replayable_routers(model)
            chunk_feed_forward(model, section, f"{name}.model")
            if isinstance(section, TrainedModelSection) and is_trained:
                checkpoint_layers(model, section, f"{name}.model", on_gpu=False)
            if config.algo.router_aux_coef and is_trained and head is not Head.VALUES:
                num_chosen(model, f"{name}.model")
        except ModelError as error:
            yield from error.problems
