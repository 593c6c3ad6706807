"""The models of a run, checked by their small files before anything starts."""

from collections.abc import Mapping
from pathlib import Path

from rlhf.algorithms.needs import Needs, needs_of
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.expected_tensors import LINEAR_LAYERS
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import ModelFacts, read_model
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.base import Tokenizer
from rlhf.engines.models import known_models
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.errors import ConfigError, ModelError
from rlhf.launch.findings import refusal
from rlhf.launch.model_checks import head_of_role, misfits
from rlhf.planning.roles import model_of


def load_run_tokenizer(config: TrainConfig, needs: Needs) -> Tokenizer:
    """The tokenizer of the model that the run exports, without transformers where its files need none of it."""
    role = needs.exported_role
    return load_tokenizer(
        model_of(config.models[role.value], role),
        key=f"{role}.model",
        chat_template=config.data.chat_template,
        plain=True,
    )


def require_models(config: TrainConfig) -> None:
    """Refuse models that do not work together, as far as their config and tokenizer files show, and those that workers
    could not load, as far as the headers of weights on this machine show. Small files that are not on this machine are
    downloaded from the hub. transformers is imported for models that are not of a common kind only.

    Raises:
        ModelError: a model is missing, is of an unknown kind, or has another vocabulary than the policy.
        ConfigError: a model's context is too short for the configured lengths.
    """
    needs = needs_of(config.algo)
    problems: list[str] = []
    facts: Mapping[str, ModelFacts | None] | None = _known(config, needs)
    if facts is None:
        from rlhf.launch.loadable_models import examined  # noqa: PLC0415  imports torch and transformers

        facts, problems = examined(config, needs)
    classes: set[type[ConfigError]] = {ModelError} if problems else set()
    for misfit in misfits(config, facts):
        problems.append(f"{', '.join(misfit.keys)}: {misfit.text}")
        classes.add(misfit.error)
    if problems:
        raise refusal(problems, classes)


def _known(config: TrainConfig, needs: Needs) -> dict[str, ModelFacts] | None:
    """What the small files of each model say, by its name, where it is known that transformers loads every one of
    them, with what is asked of it; None if it has to be asked."""
    facts: dict[str, ModelFacts] = {}
    if isinstance(config, OnlineConfig) and config.rollout.router_replay:
        return None
    for name, section in config.models.items():
        if section.model is None:
            continue
        folder = Path(section.model)
        if not folder.is_dir() or config.algo.router_aux_coef or not _is_usual(section):
            return None
        try:
            fact = read_model(folder)
        except ModelFileError:
            return None
        head, is_trained = head_of_role(name, section, needs, is_scorer=fact.num_labels == 1)
        if not known_models.loads(folder, head, is_new=is_trained):
            return None
        facts[section.model] = fact
    return facts


def _is_usual(section: ModelSection) -> bool:
    """Whether nothing is asked of a model that some models of the known kinds could not do."""
    if isinstance(section, TrainedModelSection) and (
        section.freeze_router or not set(section.lora.targets) <= set(LINEAR_LAYERS)
    ):
        return False
    return not section.float32_router and section.trust_remote_code is None
