"""What is wrong between models, and between them and the config, as far as their small files say."""

from collections.abc import Iterator, Mapping
from contextlib import suppress

from rlhf.config.commands import (
    OnlineConfig,
    TrainConfig,
)
from rlhf.config.model_files import (
    ModelFacts,
    ModelFileError,
    different_tokens,
)
from rlhf.config.problems import Problem
from rlhf.errors import ModelError

RENAMED_TOKENS = 0.01
"""Share of the token ids that two models may read otherwise: another tokenizer differs in nearly all."""


def misfits(config: TrainConfig, facts: Mapping[str, ModelFacts | None]) -> Iterator[Problem]:
    """What is wrong between models, and between them and the config. `facts` by model, where they are known."""
    known = {role: fact for role, section in config.models.items() if (fact := facts.get(section.model or ""))}
    yield from _context(config, known)
    yield from _vocabulary(known)
    yield from _chat_template(config, known)
    if isinstance(config, OnlineConfig):
        yield from _scorers(known)


def _context(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """The longest sequence fits into every model's context."""
    for role, fact in known.items():
        if fact.context is None:
            continue
        if not isinstance(config, OnlineConfig):
            keys: tuple[str, ...] = ("data.max_tokens",)
            total, said = config.data.max_tokens, f"{config.data.max_tokens}"
            room, name = fact.context, "data.max_tokens"
        else:
            keys = ("rollout.max_response_tokens", "rollout.max_prompt_tokens")
            prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
            total, said = prompt + response, f"{prompt} + {response}"
            room, name = fact.context - prompt, "rollout.max_response_tokens"
        if total > fact.context:
            advice = f"Lower {name} to {room}." if room > 0 else "Lower rollout.max_prompt_tokens too."
            model = config.models[role].model
            text = f"{said} tokens > context {fact.context} of {model}. {advice}"
            yield Problem(keys=(*keys, f"{role}.model"), text=text)
            return


def _vocabulary(known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Models that read the policy's token ids have its vocabulary."""
    policy = known.get("policy")
    for role, why in (("reference", "KL is undefined"), ("critic", "it cannot read the policy's tokens")):
        other = known.get(role)
        if not policy or not other or other.folder == policy.folder:
            continue
        if text := _difference(policy, other):
            yield Problem(keys=(f"{role}.model", "policy.model"), text=f"{text}; {why}.", error=ModelError)


def _difference(policy: ModelFacts, other: ModelFacts) -> str | None:
    """Why token ids of the policy mean something else to another model. A few that were renamed are passed over."""
    if policy.vocab_size != other.vocab_size:
        return f"vocab differs from policy ({other.vocab_size} vs {policy.vocab_size})"
    with suppress(ModelFileError):  # the policy's is loaded, and what is wrong with it said then
        different, shared = different_tokens(policy.folder, other.folder)
        if different > RENAMED_TOKENS * shared:
            return f"as many tokens as the policy, but {different} of {shared} stand for other text"
    return None


def _chat_template(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Who renders prompts has a template. An online run's reward model reads text."""
    for role in ("policy",) if isinstance(config, OnlineConfig) else ("policy", "reward"):
        fact = known.get(role)
        if fact and config.data.template == "chat" and not fact.has_chat_template:
            text = f"chat, but the tokenizer of {config.models[role].model} has no chat template. Use plain."
            yield Problem(keys=("data.template", f"{role}.model"), text=text, error=ModelError)


def _scorers(known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Reward models have a head with one output."""
    for role, fact in known.items():
        if not role.startswith("reward") or fact.num_labels == 1:
            continue
        got = "no score head" if fact.num_labels is None else f"{fact.num_labels} labels"
        text = f"has {got}, need a head with 1. Train one with `rlhf train rm`."
        yield Problem(keys=(f"{role}.model",), text=text, error=ModelError)
