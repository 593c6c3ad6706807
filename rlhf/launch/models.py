"""The models of a run, checked by their small files before anything starts."""

from collections.abc import Iterator, Mapping

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm, Needs
from rlhf.config.commands import TrainConfig
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import ModelFacts, describe_model
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.config.reward import StartedSource
from rlhf.engines.base import Tokenizer
from rlhf.engines.models.adapters import require_targets
from rlhf.engines.models.loading import WEIGHTS, inspect_model, require_supported_model
from rlhf.engines.models.routers import checked_routers, num_chosen
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.rewards import head_of
from rlhf.errors import ConfigError, ModelError
from rlhf.launch.check import refusal
from rlhf.launch.model_checks import misfits
from rlhf.planning.roles import model_of
from rlhf.types import Head, Role


def load_run_tokenizer(config: TrainConfig, algorithm: Algorithm) -> Tokenizer:
    """The tokenizer of the model that the run exports."""
    role = algorithm.needs.exported_role
    return load_tokenizer(
        model_of(config.models[role.value], role), key=f"{role}.model", chat_template=config.data.chat_template
    )


def require_models(config: TrainConfig) -> None:
    """Refuse models that do not work together, as far as their config and tokenizer files show, and those that workers
    could not load, as far as the headers of weights on this machine show. Small files that are not on this machine are
    downloaded from the hub.

    Raises:
        ModelError: a model is missing, is of an unknown kind, or has another vocabulary than the policy.
        ConfigError: a model's context is too short for the configured lengths.
    """
    facts: dict[str, ModelFacts | None] = {}
    problems: list[str] = []
    classes: set[type[ConfigError]] = set()
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
            classes.add(ModelError)
        except ModelFileError as error:
            problems.append(f"{role}.model: {error}")
            classes.add(ModelError)
    problems += _unusable(config, build_algorithm(config.algo).needs, facts)
    if problems:
        classes.add(ModelError)
    for misfit in misfits(config, facts):
        problems.append(f"{', '.join(misfit.keys)}: {misfit.text}")
        classes.add(misfit.error)
    if problems:
        raise refusal(problems, classes)


def _unusable(config: TrainConfig, needs: Needs, facts: Mapping[str, ModelFacts | None]) -> Iterator[str]:
    """Why models that are on this machine do not load with the head that they get, or lack what is asked of them, a
    line for each problem."""
    seen: set[tuple[str, Head]] = set()
    for name, section in config.models.items():
        fact = facts.get(section.model or "")
        if section.model is None or fact is None:
            continue
        head, is_trained = _head_of(name, section, needs, is_scorer=fact.num_labels == 1)
        if not any(fact.folder.glob(WEIGHTS)) or (section.model, head) in seen:
            continue
        seen.add((section.model, head))
        try:
            model = inspect_model(section, section.model, head, where=f"{name}.model", new_head=is_trained)
            if isinstance(section, TrainedModelSection) and section.lora.rank:
                require_targets(model, section.lora, f"{name}.lora.targets")
            checked_routers(model, section, f"{name}.model")
            if config.algo.router_aux_coef and is_trained and head is not Head.VALUES:
                num_chosen(model, f"{name}.model")
        except ModelError as error:
            yield from error.problems


def _head_of(name: str, section: ModelSection, needs: Needs, *, is_scorer: bool) -> tuple[Head, bool]:
    """The head that a model of the config is loaded with, and whether it is trained. `is_scorer`: its files are those
    of a classifier with one label."""
    if name in set(Role) and (role := Role(name)) in needs.trains:
        return needs.trains[role], True
    if isinstance(section, StartedSource):
        return head_of(section), False
    return Head.SCORES if name == Role.REWARD and is_scorer else Head.LOG_PROBS, False
