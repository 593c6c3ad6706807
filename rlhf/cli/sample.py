"""`rlhf sample`: scored responses to every prompt of a data set, as rows, in one process. An unfinished file is
continued."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rlhf.algorithms.response_metrics import length_metrics
from rlhf.config.models import dtype_on
from rlhf.config.reward import RewardSection, StartedSource
from rlhf.config.rollout import RolloutSection
from rlhf.config.tools import SampleConfig
from rlhf.engines.base import RewardSource, RolloutEngine, Tokenizer, generate
from rlhf.engines.models.loading import resolve_folder
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.models.whole_model import require_whole_model
from rlhf.engines.process.device_memory import local_device
from rlhf.engines.rewards import build_reward, build_scored, head_of, probe
from rlhf.engines.rollout.open_engine import engine_kind
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.errors import ConfigError, DataError
from rlhf.launch.sampled_episodes import SampledWorld
from rlhf.launch.sampling_engine import open_tried_engine
from rlhf.launch.trained_model import find_model
from rlhf.launch.unfit_rows import unfit_rows
from rlhf.orchestrator.data.curation import Row
from rlhf.orchestrator.data.samples import NUM_ANSWERS, SampleFile, make_requests, sample_row
from rlhf.orchestrator.data.split import fingerprint, prompt_content
from rlhf.orchestrator.run.console import make_console
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.terminal import counted, library_output_to, write_line
from rlhf.types import Json, Prompt, Reward, RolloutRequest, Sampling

MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
EDGE_BYTES = 2**20
HARMLESS = {"out", "model", "data", "debug", "gpu_memory_utilization", "kv_cache_gib", "engine", "dtype", "max_prompts"}
"""Settings that do not change samples, or whose result is recorded instead."""


def run_sample(config: SampleConfig) -> int:
    """Sample, score and write every response that is missing. Returns the exit code.

    Raises:
        ConfigError: the file of samples was made with other settings, or the lengths do not fit the model.
        DataError, ModelError, RewardError: rows, model or reward source cannot be used.
    """
    assert config.model is not None, "checked by the config's loader"
    reward = config.reward.by_environment() if config.rollout.gives_reward else config.reward
    config = config.model_copy(update={"model": find_model(config.model), "reward": reward})
    assert config.model is not None, "checked by the config's loader"
    assert config.out is not None, "checked by the config's loader"
    require_fit(config, config.model)
    tokenizer = load_tokenizer(config.model, key="model", chat_template=config.data.chat_template)
    world = SampledWorld(config.rollout)
    prompts = read_prompts(config, tokenizer, world)
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=tokenizer.stop_token_ids,
    )
    chunks = [prompts[start : start + config.chunk_size] for start in range(0, len(prompts), config.chunk_size)]
    requests = [make_requests(chunk, config.num_samples, config.seed, sampling) for chunk in chunks]
    device = local_device()
    settings = settings_of(config, prompts, tokenizer, device)
    path = Path(config.out)
    with SampleFile.open(path, settings, [[request.id for request in chunk] for chunk in requests]) as file:
        if file.num_chunks == len(chunks):
            write_line(f"{path}: all {settings[NUM_ANSWERS]} responses are there already.")
            return 0
        rewards = open_rewards(config.reward.for_answers_of(config.max_tokens), tokenizer, device)
        try:
            if rewards is not None:
                group_size, has_episodes = config.num_samples, world.has_episodes
                probe(rewards, prompts[0], tokenizer, group_size=group_size, has_episodes=has_episodes)
            context = config.max_prompt_tokens + config.max_tokens
            with library_output_to(path.with_name(f"{path.name}.log")) as stream:
                engine = start_engine(config, device)
                try:
                    with world.playing(engine, tokenizer, prompts, context) as player:
                        sampled = Sampled(config.model, player, rewards, tokenizer, world.tools)
                        write_chunks(stream, file, chunks, requests, sampled)
                finally:
                    engine.close()
        finally:
            if rewards is not None:
                rewards.close()
    write_line(f"{path}: {settings[NUM_ANSWERS]} responses to {counted(len(prompts), 'prompt')}.")
    return 0


def require_fit(config: SampleConfig, model: str) -> None:
    """Raise ModelError or ConfigError if the model's files show that it cannot be used."""
    facts = require_whole_model(
        model,
        engine_kind(RolloutSection(engine=config.engine)),
        where="model",
        device=local_device(),
        dtype=dtype_on(config.dtype, local_device()),
        tensor_parallel_size=config.tensor_parallel_size,
    )
    total = config.max_prompt_tokens + config.max_tokens
    if facts.context is not None and total > facts.context:
        room = facts.context - config.max_prompt_tokens
        advice = f"Lower --max-tokens to {room}." if room > 0 else "Lower --max-prompt-tokens too."
        sizes = f"{config.max_prompt_tokens} + {config.max_tokens}"
        raise ConfigError(f"--max-tokens: {sizes} tokens > context {facts.context} of {model}. {advice}")


def read_prompts(config: SampleConfig, tokenizer: Tokenizer, world: SampledWorld) -> tuple[Prompt, ...]:
    """The prompts to sample responses to, without held-out ones. Raises DataError, also if rows lack a column that a
    reward source or the environment needs."""
    prompts = world.load_prompts(config.data, tokenizer, config.max_prompt_tokens).train[: config.max_prompts]
    rows = ((prompt.id, prompt.label, prompt.metadata) for prompt in prompts)
    if unfit := unfit_rows(config.data, config.reward.all_sources, rows):
        raise DataError(unfit)
    return prompts


def settings_of(config: SampleConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer, device: str) -> dict[str, Json]:
    """Everything that decides the responses. A file of samples can only be continued with the same values."""
    assert config.model is not None, "checked by the config's loader"
    given: dict[str, Json] = config.model_dump(mode="json", exclude=HARMLESS | {"reward", "rollout"})
    if config.rollout.has_episodes:
        given["rollout"] = config.rollout.model_dump(mode="json", exclude_defaults=True)
    reward: dict[str, Json] = config.reward.model_dump(mode="json", exclude_defaults=True)
    return given | {
        "model": config.model,
        "model_digest": model_digest(resolve_folder(config.model, where="model")),
        "tokenizer": tokenizer.fingerprint(),
        "engine": engine_kind(RolloutSection(engine=config.engine)),
        "dtype": dtype_on(config.dtype, device),
        "device": device,
        "reward": reward,
        "prompts": fingerprint([prompts], prompt_content),
        NUM_ANSWERS: len(prompts) * config.num_samples,
    }


def model_digest(folder: Path) -> str:
    """Changes when a model does: names and sizes of its files, all of the small ones, both ends of the weights."""
    digest = hashlib.sha256()
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    for name in (*MODEL_FILES, *weights):
        file = folder / name
        if not file.is_file():
            continue
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE_BYTES))
            stream.seek(max(file.stat().st_size - EDGE_BYTES, 0))
            digest.update(stream.read())
    return digest.hexdigest()


def open_rewards(section: RewardSection, tokenizer: Tokenizer, device: str) -> RewardSource | None:
    """The weighted sum of the sources, with reward models in this process; None if there is no source."""
    models = [source for source in section.all_sources if isinstance(source, StartedSource)]
    opened: dict[str, RewardSource] = {}
    for source in models:
        from rlhf.engines.models.text_pairs import load_reward_tokenizer  # noqa: PLC0415  most runs have no reward model
        from rlhf.engines.training.local_scoring import LocalScorer  # noqa: PLC0415  as above

        assert source.model is not None, "a model source names its model"
        opened[source.label] = build_scored(
            source,
            LocalScorer(source, source.model, head_of(source), device=device, where="reward.model"),
            policy_tokenizer=tokenizer,
            reward_tokenizer=load_reward_tokenizer(source, source.model, key="reward.model"),
        )
    return build_reward(section.all_sources, opened) if section.all_sources else None


def start_engine(config: SampleConfig, device: str) -> RolloutEngine:
    """Load the model."""
    assert config.model is not None, "checked by the config's loader"
    section = RolloutSection(
        engine=config.engine,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_tokens,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_gib=config.kv_cache_gib,
    )
    spec = EngineSpec(
        section=section,
        model=config.model,
        dtype=dtype_on(config.dtype, device),
        device=device,
        seed=config.seed,
        sync_backend="gloo" if device == "cpu" else "nccl",
    )
    return open_tried_engine(spec, name="sample")


@dataclass(frozen=True, slots=True)
class Sampled:
    """What makes rows of requests."""

    model: str
    engine: RolloutEngine
    rewards: RewardSource | None
    tokenizer: Tokenizer
    tools: Callable[[Prompt], Sequence[Json]]
    """Schemas of the tools that a prompt was rendered with."""


def write_chunks(
    stream: TextIO,
    file: SampleFile,
    chunks: Sequence[Sequence[Prompt]],
    requests: Sequence[Sequence[RolloutRequest]],
    sampled: Sampled,
) -> None:
    """Sample, score and append every chunk that is missing in the file. `stream` shows the progress."""
    console = make_console(len(chunks), stream)
    try:
        for number in range(file.num_chunks, len(chunks)):
            start = time.monotonic()
            rows = sample_chunk(sampled, chunks[number], requests[number])
            file.append(rows)
            console.log(number + 1, chunk_metrics(rows, time.monotonic() - start))
    finally:
        console.close()


def sample_chunk(sampled: Sampled, prompts: Sequence[Prompt], requests: Sequence[RolloutRequest]) -> list[Row]:
    """The rows of one chunk."""
    engine, tokenizer = sampled.engine, sampled.tokenizer
    by_id = {prompt.id: prompt for prompt in prompts}
    request_prompts = [by_id[request.prompt_id] for request in requests]
    scores: Sequence[Reward | None]
    if sampled.rewards is None:
        rollouts = generate(engine, requests)
        responses = [tokenizer.decode(rollout.token_ids) for rollout in rollouts]
        scores = [None] * len(rollouts)
    else:
        sampler = Sampler(engine, sampled.rewards, tokenizer)
        rollouts = sampler.generate(requests)
        responses, scores = sampler.score(request_prompts, rollouts)
    return [
        sample_row(*item, sampled.model, sampled.tools(item[0]))
        for item in zip(request_prompts, requests, rollouts, responses, scores, strict=True)
    ]


def chunk_metrics(rows: Sequence[Row], seconds: float) -> Mapping[str, Json]:
    """What the console shows of a chunk."""
    lengths = [length for row in rows if isinstance(length := row["num_tokens"], int)]
    rewards = [row["reward"] for row in rows]
    scores = [reward for reward in rewards if isinstance(reward, float)]
    shown: dict[str, Json] = {
        **length_metrics(lengths),
        "time/step": seconds,
        "throughput/tokens_per_s": sum(lengths) / max(seconds, 1e-9),
    }
    return shown | ({"reward/mean_all": sum(scores) / len(scores)} if scores else {})
