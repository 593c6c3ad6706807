"""One episode of a scripted policy, with the tools and the environment of a run: what a check shows."""

from dataclasses import dataclass

from rlhf.config.rollout import RolloutSection
from rlhf.conversations.turns import LeftOutError, RewrittenError
from rlhf.engines.base import Tokenizer
from rlhf.environments.scripted import ScriptedPolicy, script_for
from rlhf.environments.spec import Described
from rlhf.episode import EpisodeRollout
from rlhf.errors import DataError, ModelError
from rlhf.launch.agents import episode_engine, make_rules
from rlhf.repair import Repair
from rlhf.terminal import counted
from rlhf.types import Prompt, RolloutRequest, Sampling

MAX_TURNS = 2
"""Turns of the scripted policy: what comes back from the first one is read by the second."""
MARGIN_S = 180.0
"""Added to the deadlines of the user's code: two processes start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeTrial:
    """An episode that no model wrote."""

    prompt: Prompt
    rollout: EpisodeRollout
    tokenizer: Tokenizer

    @property
    def line(self) -> str:
        """What happened."""
        episode = self.rollout.episode
        called = [f"called {', '.join(episode.calls)} with made-up arguments"] if episode.calls else []
        failed = [f"{counted(episode.num_failed_calls, 'call')} failed"] if episode.num_failed_calls else []
        turns = counted(episode.num_turns, "turn")
        turns += f" in {episode.num_segments} segments" if episode.num_segments > 1 else ""
        what = "; ".join([*called, *failed, f"{turns}, ended by {episode.ending}", f"reward {episode.reward:.4g}"])
        failure = f" The environment failed: {episode.failure}." if episode.failure else ""
        return f"rollout: a scripted policy tried row {self.prompt.id}: {what}.{failure}"


def try_episode(
    section: RolloutSection,
    world: Described,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int,
) -> EpisodeTrial:
    """Run an episode on a row: a call of the first tool with made-up arguments, or a text for the environment, then
    another text. The user's code runs as in a run, each call with its deadline; a failure is in the result.
    `max_tokens` are those of all segments with their prompts.

    Raises:
        ModelError: the chat template cannot write these turns.
        TimeoutError: it took longer than all deadlines together.
    """
    bounded = section.model_copy(
        update={
            "max_turns": min(section.max_turns, MAX_TURNS),
            "environment_retries": 0,
            "on_environment_error": "drop",
        }
    )
    try:
        met = world.of(prompt.metadata)
        policy = ScriptedPolicy(tokenizer, script_for(met), met)
    except (DataError, RewrittenError, LeftOutError) as error:
        raise ModelError(f"rollout: the chat template writes no turn of a scripted policy ({error}).") from error
    request = RolloutRequest(
        id="trial/0",
        prompt_id=prompt.id,
        prompt_token_ids=prompt.token_ids,
        seed=0,
        sampling=Sampling(max_tokens=section.max_response_tokens),
    )
    context = section.max_prompt_tokens + section.max_response_tokens
    rules = make_rules(bounded, world, tokenizer, context=context, max_tokens=max_tokens)
    episodes = episode_engine(bounded, policy, rules, [prompt], _ignore)
    try:
        (future,) = episodes.submit([request])
        rollout = future.result((MAX_TURNS + 2) * section.environment_timeout_s + MARGIN_S)
    finally:
        episodes.close()
    assert isinstance(rollout, EpisodeRollout), "the engine's responses are episodes"
    return EpisodeTrial(prompt=prompt, rollout=rollout, tokenizer=tokenizer)


def _ignore(repair: Repair) -> None:
    """The result says the same."""
