"""The models of a run, checked by their small files before anything starts."""

from rlhf.algorithms.base import Algorithm
from rlhf.config.commands import TrainConfig
from rlhf.config.model_files import ModelFacts, ModelFileError, describe_model
from rlhf.engines.base import Tokenizer
from rlhf.engines.models.loading import require_supported_model
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.errors import ConfigError, ModelError
from rlhf.launch.check import refusal
from rlhf.launch.model_checks import misfits
from rlhf.planning.roles import model_of


def load_run_tokenizer(config: TrainConfig, algorithm: Algorithm) -> Tokenizer:
    """The tokenizer of the model that the run exports."""
    role = algorithm.needs.exported_role
    return load_tokenizer(
        model_of(config.models[role.value], role), key=f"{role}.model", chat_template=config.data.chat_template
    )


def require_models(config: TrainConfig) -> None:
    """Refuse models that do not work together, as far as their config and tokenizer files show. Files that are not on
    this machine are downloaded from the hub.

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
    for misfit in misfits(config, facts):
        problems.append(f"{', '.join(misfit.keys)}: {misfit.text}")
        classes.add(misfit.error)
    if problems:
        raise refusal(problems, classes)
