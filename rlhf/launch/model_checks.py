"""Checks that the models of a run work together and with the config, as far as their small files show."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from rlhf.algorithms.needs import Needs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.engine_limits import EngineSizes, vllm_limit
from rlhf.config.expert_families import SPLIT_FAMILIES
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import ModelFacts, only_scores, two_stacks
from rlhf.config.models import ModelSection, TrainedModelSection, dtype_on
from rlhf.config.problems import Problem
from rlhf.config.reward import PrmSource, StartedSource
from rlhf.config.rollout import ENGINES
from rlhf.config.tokenizer_files import different_tokens
from rlhf.engines.rewards import head_of
from rlhf.errors import ModelError
from rlhf.types import Head, Role

GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""A machine without any of these has no GPU that vLLM could use."""
RENAMED_TOKENS = 0.01
"""Largest share of token ids with different tokens in two models: a few may be renamed; another tokenizer differs in
nearly all."""


TOO_LONG = ("rollout.max_response_tokens", "data.max_tokens")
"""Where sequences that are longer than a model's context are reported, online and offline."""


def head_of_role(name: str, section: ModelSection, needs: Needs, *, is_scorer: bool) -> tuple[Head, bool]:
    """The head that a model of the config is loaded with, and whether it is trained. `is_scorer`: its files are those
    of a classifier with one label."""
    if name in set(Role) and (role := Role(name)) in needs.trains:
        return needs.trains[role], True
    if isinstance(section, StartedSource):
        return head_of(section), False
    return Head.SCORES if name == Role.REWARD and is_scorer else Head.LOG_PROBS, False


def misfits(config: TrainConfig, facts: Mapping[str, ModelFacts | None]) -> Iterator[Problem]:
    """What does not work between models, and between them and the config. `facts` are by model, if known."""
    known = {role: fact for role, section in config.models.items() if (fact := facts.get(section.model or ""))}
    yield from too_long(config, known)
    yield from _split_heads(config, known)
    yield from _split_experts(config, known)
    yield from _vocabulary(known)
    yield from _chat_template(config, known)
    yield from _attention(config, known)
    if isinstance(config, OnlineConfig):
        yield from _scorers(config, known)
        yield from _engine_limits(config, known)


def too_long(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """The longest sequence fits into every model's context; of those that are too short, the shortest is named."""
    contexts = {role: fact.context for role, fact in known.items() if fact.context is not None}
    role = min(contexts, key=contexts.__getitem__, default="")
    if not role or config.longest_sequence <= contexts[role]:
        return
    fitting = fitting_lengths(config, contexts[role])
    keys: tuple[str, ...] = TOO_LONG[1:]
    shown = f"{config.longest_sequence}"
    if isinstance(config, OnlineConfig):
        keys = (TOO_LONG[0], "rollout.max_prompt_tokens")
        shown = f"{config.rollout.max_prompt_tokens} + {config.rollout.max_response_tokens}"
    advice = " and ".join(f"{key} to {limit}" for key, limit in fitting.items())
    example = ", for example" if len(fitting) > 1 else ""
    text = f"{shown} tokens > context {contexts[role]} of {config.models[role].model}. Lower {advice}{example}."
    yield Problem(keys=(*keys, f"{role}.model"), text=text)


def fitting_lengths(config: TrainConfig, context: int) -> dict[str, int]:
    """The limits to lower, by key, where sequences are longer than a context, and what fits into it: shorter responses;
    if prompts alone can fill it, half of it for each of both."""
    if not isinstance(config, OnlineConfig):
        return {"data.max_tokens": context}
    if config.rollout.max_prompt_tokens < context:
        return {"rollout.max_response_tokens": context - config.rollout.max_prompt_tokens}
    return {"rollout.max_prompt_tokens": context // 2, "rollout.max_response_tokens": context - context // 2}


def within_context(config: TrainConfig, facts: Iterable[ModelFacts]) -> TrainConfig:
    """A config with its lengths lowered to what fits into the contexts of its models; itself where they fit."""
    context = min((fact.context for fact in facts if fact.context is not None), default=config.longest_sequence)
    if config.longest_sequence <= context:
        return config
    limits = {key.partition(".")[2]: limit for key, limit in fitting_lengths(config, context).items()}
    name, section = ("rollout", config.rollout) if isinstance(config, OnlineConfig) else ("data", config.data)
    return config.model_copy(update={name: section.model_copy(update=limits)})


def _attention(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """No model is asked for an attention that leaves out a part of it."""
    for role, fact in known.items():
        if fact.caps_scores and config.models[role].attention == "sdpa":
            text = f"sdpa knows no cap on attention scores, which {config.models[role].model} has. Set auto or eager."
            yield Problem(keys=(f"{role}.attention", f"{role}.model"), text=text, error=ModelError)


def _split_heads(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Attention heads split over the processes that compute a micro-batch together."""
    for role, fact in known.items():
        size, num_heads = config.models[role].sequence_parallel_size, fact.num_heads
        if size > 1 and fact.other_head is not None:
            yield Problem(
                keys=(f"{role}.sequence_parallel_size", f"{role}.model"),
                text=f"processes of {fact.folder.name}, which has no score at the last token, share nothing. Set 1.",
            )
        if num_heads and num_heads % size:
            fitting = ", ".join(str(n) for n in range(1, min(num_heads, 64) + 1) if num_heads % n == 0)
            yield Problem(
                keys=(f"{role}.sequence_parallel_size", f"{role}.model"),
                text=f"{num_heads} attention heads of {fact.folder.name} do not split over {size} processes. Use one "
                f"of {fitting}.",
            )


def _split_experts(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """DeepSpeed's AutoEP knows the model, and its experts split over the processes that have them among them."""
    for role, fact in known.items():
        section = config.models[role]
        if not isinstance(section, TrainedModelSection) or (size := section.expert_parallel_size) == 1:
            continue
        keys, name = (f"{role}.expert_parallel_size", f"{role}.model"), fact.folder.name
        if fact.model_type not in SPLIT_FAMILIES:
            families = ", ".join(sorted(SPLIT_FAMILIES))
            text = f"DeepSpeed's AutoEP does not know a {fact.model_type} ({name}), but {families}. Set 1."
            yield Problem(keys=keys, text=text)
        elif fact.num_experts and fact.num_experts % size:
            fitting = ", ".join(str(n) for n in range(1, min(fact.num_experts, 64) + 1) if fact.num_experts % n == 0)
            text = f"{fact.num_experts} experts of {name} do not split over {size} processes. Use one of {fitting}."
            yield Problem(keys=keys, text=text)


def _vocabulary(known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Models that get the policy's token ids have its vocabulary."""
    policy = known.get("policy")
    for role, why in (("reference", "KL is undefined"), ("critic", "it cannot read the policy's tokens")):
        other = known.get(role)
        if not policy or not other or other.folder == policy.folder:
            continue
        if text := _difference(policy, other):
            yield Problem(keys=(f"{role}.model", "policy.model"), text=f"{text}; {why}.", error=ModelError)


def _difference(policy: ModelFacts, other: ModelFacts) -> str | None:
    """Why token ids of the policy have another meaning in another model. A few renamed tokens are accepted."""
    if policy.vocab_size != other.vocab_size:
        return f"vocab differs from policy ({other.vocab_size} vs {policy.vocab_size})"
    with suppress(ModelFileError):  # an unreadable tokenizer is reported when it is loaded
        different, shared = different_tokens(policy.folder, other.folder)
        if different > RENAMED_TOKENS * shared:
            return f"as many tokens as the policy, but {different} of {shared} differ"
    return None


def _chat_template(config: TrainConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """The model whose tokenizer renders the rows has a chat template. An online run's reward model gets text."""
    for role in ("policy",) if config.is_online else ("policy", "reward"):
        fact = known.get(role)
        if fact and config.data.template == "chat" and not fact.has_chat_template:
            text = f"chat, but the tokenizer of {config.models[role].model} has no chat template. Use plain."
            yield Problem(keys=("data.template", f"{role}.model"), text=text, error=ModelError)


def _engine_limits(config: OnlineConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """vLLM can serve the policy."""
    rollout, fact = config.rollout, known.get("policy")
    engine = next((name for name in ENGINES if find_spec(name)), "") if rollout.engine == "auto" else rollout.engine
    if fact is None or engine != "vllm":
        return
    on_cpu = config.cluster.address is None and not any(Path(device).exists() for device in GPU_DEVICES)
    dtype = dtype_on(config.policy.dtype, "cpu" if on_cpu else "cuda")
    sizes = EngineSizes(rollout.tensor_parallel_size, rollout.pipeline_parallel_size, rollout.expert_parallel)
    if limit := vllm_limit(fact, sizes, on_cpu=on_cpu, dtype=dtype):
        yield Problem(keys=(f"rollout.{limit.setting}", "policy.model"), text=limit.text)


def _scorers(config: OnlineConfig, known: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    """Reward models have a head with one output, critics and process reward models a score for each token."""
    has_steps = any(isinstance(source, PrmSource) for source in config.reward.all_sources)
    for role, fact in known.items():
        is_reward = role.startswith("reward")
        if fact.other_head is not None and (fact.has_decoder_behind_encoder or not is_reward or has_steps):
            says = two_stacks if fact.has_decoder_behind_encoder else only_scores
            yield Problem(keys=(f"{role}.model",), text=says(fact.other_head), error=ModelError)
            continue
        if not is_reward:
            continue
        if fact.num_labels == 1:
            continue
        got = "no score head" if fact.num_labels is None else f"{fact.num_labels} labels"
        text = f"has {got}, need a head with 1. Train one with `rlhf train rm`."
        yield Problem(keys=(f"{role}.model",), text=text, error=ModelError)
