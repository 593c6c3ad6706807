"""Turns that a real vLLM engine samples, in the forms in which chat templates of many families write calls: the trainer
gives each token of the policy the log-prob with which it was sampled. `RLHF_TEST_TURNS` is the number of episodes of
each family."""

import asyncio
import os
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from rlhf.algorithms.sequences import join, learned
from rlhf.config.models import ModelSection
from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import RolloutEngine
from rlhf.engines.models.fresh_model import make_llama
from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.local_scoring import LocalScorer
from rlhf.environments.calls import Call
from rlhf.environments.episode import EpisodeLimits, EpisodeRun, Rules, Sample
from rlhf.environments.formats.known import find_format
from rlhf.environments.spec import EpisodeWorld
from rlhf.episode import EpisodeRollout
from rlhf.orchestrator.step.batching import MicroBatchLimits, pack_tokens, plan_batches, unpack_tokens
from rlhf.types import Experience, FloatArray, Head, Json, Prompt, Rollout, RolloutRequest
from tests.integration.rollout_support import HAS_VLLM, IGNORE_VLLM_IMPORT_WARNINGS
from tests.unit.environments.family_templates import TEMPLATES, WITHOUT_TOOLS, family_tokenizer
from tests.unit.environments.random_episodes import Policy, World
from tests.unit.environments.support import make_prompt, make_request

pytestmark = [
    *IGNORE_VLLM_IMPORT_WARNINGS,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
]

IN_EVERY_CHANGE = ("Qwen 3", "DeepSeek V3.1", "gpt-oss")
"""Thoughts that a template drops, calls in tokens of their own, channels. The others every night."""
FAMILIES = [
    family
    for family in TEMPLATES
    if family not in WITHOUT_TOOLS and ("RLHF_TEST_TURNS" in os.environ or family in IN_EVERY_CHANGE)
]
TOOL: tuple[Json, ...] = (
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks up.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}},
        },
    },
)
VOCABULARY, CONTEXT = 1536, 1024
NUM_STEPS, LR = 120, 4e-3
NUM_SAMPLED = int(os.environ.get("RLHF_TEST_TURNS", "16"))
TOLERANCE = 1e-4
LIMITS = EpisodeLimits(
    max_turns=3, max_turn_tokens=150, max_tool_response_tokens=40, context=CONTEXT, max_tokens=CONTEXT
)


class Brief(Policy):
    """Says little in a turn, so that the model soon knows it by heart."""

    def plain(self, most: int = 8) -> str:
        return super().plain(min(most, 2))

    def call(self) -> Call:
        return Call(name="lookup", arguments={"text": self.plain(), "count": self.random.randint(-9, 99)})


@dataclass(frozen=True, kw_only=True)
class Family:
    """The form of a family, and a prompt in it."""

    tokenizer: HfTokenizer
    rules: Rules
    prompt: Prompt

    @classmethod
    def of(cls, name: str) -> Self:
        tokenizer = family_tokenizer(name)
        described, form = EpisodeWorld(tools=TOOL), find_format(tokenizer, TOOL)
        return cls(
            tokenizer=tokenizer,
            rules=Rules(tokenizer=tokenizer, described=described, format=form, limits=LIMITS),
            prompt=make_prompt(tokenizer, ", ".join([name] * 3), tools=TOOL),
        )

    async def play(self, sample: Sample, seed: int) -> EpisodeRollout:
        """An episode. What the tool returns is the same in all."""
        request = make_request(self.prompt, f"{self.prompt.text}/{seed}", max_tokens=600, seed=seed)
        sampling = replace(request.sampling, stop_token_ids=self.tokenizer.stop_token_ids)
        world = World(random=random.Random(1))
        request = replace(request, sampling=sampling)
        return await EpisodeRun(self.rules, request, self.prompt, world, sample, has_environment=False).run()

    def shown(self) -> EpisodeRollout:
        """An episode with turns as the template writes them: calls in any script, with thoughts where it has a place
        for them."""
        made = Brief(
            random=random.Random(0),
            tokenizer=self.tokenizer,
            form=self.rules.format,
            tools=TOOL,
            odd=False,
            one_call=True,
        )
        return asyncio.run(self.play(made.sample, 0))


def teach(folder: Path, families: list[Family]) -> None:
    """Write a model that has learned an episode of each family by heart, more or less."""
    make_llama(folder, vocab_size=VOCABULARY, hidden_size=64, num_layers=2, context=CONTEXT, seed=0)
    ids, own = [], []
    for family in families:
        whole = join(family.prompt, family.shown())
        for start, end in pairwise([0, *whole.segment_starts, len(whole.token_ids)]):
            ids.append(torch.tensor(whole.token_ids[start:end]))
            own.append(torch.tensor(whole.loss_mask[start:end]))
    rows = pad_sequence(ids, batch_first=True)
    learned_from = pad_sequence(own, batch_first=True)[:, 1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
        for step in range(NUM_STEPS):
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 10, 2 * (1 - step / NUM_STEPS))
            hidden = model.model(input_ids=rows).last_hidden_state[:, :-1][learned_from]
            loss = cross_entropy(model.lm_head(hidden), rows[:, 1:][learned_from])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)


def open_engine(folder: Path) -> RolloutEngine:
    """In this process, without compiling, which takes longer than what is sampled here."""
    from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415

    section = RolloutSection(
        max_num_seqs=32, max_prompt_tokens=400, max_response_tokens=600, kv_cache_gib=0.2, enforce_eager=True
    )
    return VllmRolloutEngine(EngineSpec(section=section, model=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {name: Family.of(name) for name in FAMILIES}


@pytest.fixture(scope="module")
def folder(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    teach(folder, list(families.values()))
    return folder


@pytest.fixture(scope="module")
def played(families: dict[str, Family], folder: Path) -> dict[str, list[EpisodeRollout]]:
    """Episodes of all families, which the engine has in its batches together."""
    engine = open_engine(folder)

    async def sample(request: RolloutRequest) -> Rollout:
        return await asyncio.wrap_future(engine.submit([request])[0])

    async def play() -> list[EpisodeRollout]:
        return await asyncio.gather(
            *(family.play(sample, seed) for family in families.values() for seed in range(NUM_SAMPLED))
        )

    try:
        episodes = asyncio.run(play())
    finally:
        engine.close()
    return {name: episodes[n * NUM_SAMPLED : (n + 1) * NUM_SAMPLED] for n, name in enumerate(families)}


@pytest.fixture(scope="module")
def trainer(folder: Path) -> LocalScorer:
    return LocalScorer(ModelSection(), str(folder), Head.LOG_PROBS, device="cpu")


def trained(trainer: LocalScorer, prompt: Prompt, episodes: list[EpisodeRollout], limit: int) -> list[FloatArray]:
    """What the trainer says of the tokens of each response, in passes of at most `limit` tokens."""
    data = [Experience(id=one.id, sequences=(learned(join(prompt, one)),)) for one in episodes]
    plan = plan_batches(data, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=limit))
    arrays = unpack_tokens(plan, data, trainer.forward(pack_tokens(plan, data)))
    return [arrays[n][0][len(prompt.token_ids) :] for n in range(len(data))]


@pytest.mark.parametrize("limit", [1, 4096], ids=["alone", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_trainer_gives_the_tokens_of_each_turn_their_log_probs(
    name: str, limit: int, families: dict[str, Family], played: dict[str, list[EpisodeRollout]], trainer: LocalScorer
) -> None:
    episodes = played[name]
    gaps: dict[int, list[float]] = defaultdict(list)
    for one, log_probs in zip(episodes, trained(trainer, families[name].prompt, episodes, limit), strict=True):
        own = np.ones(len(one.token_ids), dtype=bool) if one.loss_mask is None else one.loss_mask
        gap = np.abs(one.log_probs - log_probs)
        starts = [0, *(end + 1 for end in one.episode.turn_ends)]
        for turn, (start, end) in enumerate(pairwise(starts)):
            gaps[turn].append(float(gap[start:end][own[start:end]].max()))
        assert len(starts) == one.episode.num_turns + 1
    read = sum(one.episode.calls.get("lookup", 0) for one in episodes)
    most = {turn + 1: f"{max(found):.1e} in {len(found)}" for turn, found in gaps.items()}
    print(f"{name}: {read} calls; largest gap of each turn: {most}")  # noqa: T201  the figures of a long run
    assert read
    assert len(gaps) > 1, "the policy went on after what came back"
    assert max(map(max, gaps.values())) <= TOLERANCE
