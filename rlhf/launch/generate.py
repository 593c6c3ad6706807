"""Samples from a trained model, in one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from rlhf.config.data import DataSection
from rlhf.config.models import dtype_on
from rlhf.config.rollout import EpisodeSection, RolloutSection
from rlhf.config.tools import GenerateConfig
from rlhf.engines.base import Tokenizer, generate
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.models.whole_model import require_whole_model
from rlhf.engines.process.device_memory import local_device
from rlhf.engines.rollout.open_engine import engine_kind
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.episode import Episode, EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.launch.sampled_episodes import SampledWorld
from rlhf.launch.sampling_engine import open_tried_engine
from rlhf.launch.trained_model import STYLE_KEYS, episode_style, find_model, prompt_style
from rlhf.types import Message, Prompt, RolloutRequest, Sampling

MAX_PROMPT_TOKENS = 1 << 20
ROW_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A prompt with its responses."""

    prompt: Prompt
    texts: tuple[str, ...]
    """Each response as text, without special tokens."""
    episodes: tuple[Episode, ...] = ()
    """How each response came about, with tools or an environment."""


def generate_responses(config: GenerateConfig) -> list[Generated]:
    """Sample `num_samples` responses to each prompt. Returns each prompt with its responses, in order.

    Raises:
        ConfigError: no prompt was given, or it does not fit the model, or tools or environment cannot be loaded.
        RewardError: an environment failed, where on_environment_error says that this ends the command.
        ModelError: the model cannot be loaded.
    """
    assert config.model is not None, "the config's loader asked for it"
    model, device = find_model(config.model), local_device()
    section = RolloutSection(engine=config.engine)
    dtype = dtype_on("auto", device)
    facts = require_whole_model(model, engine_kind(section), where="model", device=device, dtype=dtype)
    style = style_of(config, model)
    tokenizer = load_tokenizer(model, key="model", chat_template=style.chat_template, template_key="chat_template")
    world = _world(config, model)
    prompts = read_prompts(config, tokenizer, style, world)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    spec = EngineSpec(
        section=section.model_copy(update={"max_prompt_tokens": longest, "max_response_tokens": config.max_tokens}),
        model=model,
        dtype=dtype,
        device=device,
        seed=config.seed,
        sync_backend="gloo" if device == "cpu" else "nccl",
    )
    engine = open_tried_engine(spec, name="generate")
    try:
        with world.playing(engine, tokenizer, prompts, longest + config.max_tokens) as player:
            rollouts = generate(player, make_requests(config, prompts, tokenizer, facts.context))
    finally:
        engine.close()
    n = config.num_samples
    return [
        Generated(
            prompt=prompt,
            texts=tuple(tokenizer.decode(rollout.token_ids) for rollout in sampled),
            episodes=tuple(rollout.episode for rollout in sampled if isinstance(rollout, EpisodeRollout)),
        )
        for i, prompt in enumerate(prompts)
        for sampled in [rollouts[i * n : (i + 1) * n]]
    ]


def make_requests(
    config: GenerateConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer, context: int | None
) -> list[RolloutRequest]:
    """`num_samples` requests for each prompt, each with its own seed. A response ends with the context, and engines
    allocate for the longest one."""
    sampling = Sampling(
        max_tokens=min(config.max_tokens, context or config.max_tokens),
        temperature=config.temperature,
        stop_token_ids=tokenizer.stop_token_ids,
    )
    return [
        RolloutRequest(
            id=f"{prompt.id}/{sample}",
            prompt_id=prompt.id,
            prompt_token_ids=prompt.token_ids,
            seed=config.seed + sample,
            sampling=sampling,
        )
        for prompt in prompts
        for sample in range(config.num_samples)
    ]


def style_of(config: GenerateConfig, model: str) -> DataSection:
    """How prompts are made of texts: as in the model's run, but for what is given."""
    given = {key: value for key, value in config.model_dump(include=set(STYLE_KEYS)).items() if value is not None}
    try:
        return DataSection.model_validate(prompt_style(model).model_dump(include=set(STYLE_KEYS)) | given)
    except ValidationError as error:
        lines = [f"{one['loc'][0]}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()]
        raise ConfigError(lines) from error


def _world(config: GenerateConfig, model: str) -> SampledWorld:
    section = episodes_of(config, model)
    try:
        return SampledWorld(section)
    except ConfigError as error:
        if config.rollout.model_fields_set & {"tools", "environment"}:
            raise
        where = "Run this in the folder with its code, or give --rollout.tools or --rollout.environment."
        raise ConfigError([*error.problems, f"rollout: as in the run that trained {model}. {where}"]) from error


def episodes_of(config: GenerateConfig, model: str) -> EpisodeSection:
    """Tools, environment and limits: as in the model's run, but for what is given."""
    given = {key: getattr(config.rollout, key) for key in config.rollout.model_fields_set}
    return episode_style(model).model_copy(update=given)


def read_prompts(
    config: GenerateConfig, tokenizer: Tokenizer, style: DataSection, world: SampledWorld | None = None
) -> list[Prompt]:
    """Prompts from the command line, from a text file with one per line, or from the rows of a data set."""
    world = world or SampledWorld(EpisodeSection())
    if config.prompts is None:
        _require_text(config.prompt)
        return _as_prompts(config.prompt, tokenizer, style, world)
    path = Path(config.prompts)
    if path.suffix in ROW_FILES:
        section = style.model_copy(update={"path": config.prompts})
        return list(world.load_prompts(section, tokenizer, MAX_PROMPT_TOKENS).train)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if not lines:
        raise ConfigError(f"--prompts: {path} contains no prompt.")
    return _as_prompts(lines, tokenizer, style, world)


def _as_prompts(texts: Sequence[str], tokenizer: Tokenizer, style: DataSection, world: SampledWorld) -> list[Prompt]:
    if not world.renders_turns:
        return [as_prompt(index, text, tokenizer, style) for index, text in enumerate(texts)]
    if style.template == "plain":
        raise ConfigError("template: plain joins texts, and turns with tools or an environment need chat.")
    return world.prompts_of_texts(texts, tokenizer)


def _require_text(prompts: Sequence[str]) -> None:
    """Raise ConfigError for bytes on the command line that are not UTF-8."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"--prompt: character {error.start + 1} is not text in UTF-8.") from error


def as_prompt(index: int, text: str, tokenizer: Tokenizer, style: DataSection) -> Prompt:
    """A prompt through the model's chat template, or in the format for plain text. If the style does not say which, a
    format decides for plain text; without one, a chat template is used where the model has one."""
    has_format = style.prompt_format != DataSection().prompt_format
    if style.template == "chat" or (style.template == "auto" and tokenizer.has_chat_template and not has_format):
        rendered = tokenizer.render([Message(role="user", content=text)], add_generation_prompt=True)
        token_ids = tokenizer.encode(rendered)
    else:
        rendered = style.prompt_format.replace("{prompt}", text)
        token_ids = tokenizer.encode(rendered, add_special_tokens=True)
    return Prompt(id=str(index), token_ids=np.array(token_ids, dtype=np.int64), text=rendered)
