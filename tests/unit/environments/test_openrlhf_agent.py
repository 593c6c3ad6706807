"""A file of OpenRLHF's agents runs as it stands: its text is encoded as it is, and the policy's is learned from."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.environments.adapters import load, with_options
from rlhf.environments.engine import EpisodeEngine, FaultPolicy, _by_content
from rlhf.environments.episode import EpisodeLimits
from rlhf.environments.host import describe
from rlhf.environments.routing import RunRules
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.launch.agents import call_format
from tests.unit.environments.playing import HERE, TOKENIZER, local_sessions, says
from tests.unit.environments.support import ScriptedEngine, make_prompt, make_request

AGENT = """\
from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class AgentInstance(AgentInstanceBase):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.num_steps = 0

    async def reset(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        opening = "(three turns)" if states["label"] == "opened" else ""
        return {"observation": states["observation"] + opening}

    async def step(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self.num_steps += 1
        done = self.num_steps == 3
        seen = states["observation_text"] + states["action_text"]
        return {
            "rewards": torch.tensor([float(len(states["action_text"]))]),
            "scores": torch.tensor([1.0]),
            "environment_feedback": "\\nbye" if done else "\\n<|im_start|>more?",
            "done": done,
            "sampling_params": states.get("sampling_params"),
            "extra_logs": {"seen": torch.tensor(float(len(seen)))},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self) -> None:
        super().__init__(AgentInstance)
"""


@pytest.fixture
def agent(tmp_path: Path) -> str:
    """The name of the environment."""
    (tmp_path / "agent_func.py").write_text(AGENT)
    return f"openrlhf://{tmp_path / 'agent_func.py'}"


def played(agent: str, label: str | None, *turns: str) -> tuple[EpisodeRollout, str]:
    """A response of these turns, and all its text."""
    spec = WorldSpec(environments=(agent,))
    described = describe(spec)
    assert described.raw_text
    limits = EpisodeLimits(
        context=4000, max_turns=4, max_turn_tokens=None, max_tool_response_tokens=40, max_tokens=4000
    )
    rules = RunRules(tokenizer=TOKENIZER, described=described, format=call_format(described, TOKENIZER), limits=limits)
    prompt = replace(make_prompt(TOKENIZER), metadata={}, label=label)
    faults = FaultPolicy(num_retries=0, on_error="drop")
    engine = ScriptedEngine(TOKENIZER, says(*turns))
    episodes = EpisodeEngine(engine, spec, rules, faults, [prompt], local_sessions(spec, 60.0))
    try:
        assert _by_content([prompt])
        (future,) = episodes.submit([make_request(prompt)])
        rollout = future.result(120)
    finally:
        episodes.close()
    assert isinstance(rollout, EpisodeRollout)
    return rollout, TOKENIZER.decode(rollout.token_ids.tolist(), skip_special_tokens=False)


def test_feedback_follows_turns_as_it_is_and_is_not_learned(agent: str) -> None:
    rollout, text = played(agent, None, "a", "bcd", "e")
    more = "\n<|im_start|>more?"
    assert text == f"a<|im_end|>{more}bcd<|im_end|>{more}e<|im_end|>"
    assert rollout.loss_mask is not None
    own = TOKENIZER.decode(rollout.token_ids[rollout.loss_mask].tolist(), skip_special_tokens=False)
    assert own == "a<|im_end|>bcd<|im_end|>e<|im_end|>"
    assert rollout.episode.ending is Ending.TERMINATED
    assert rollout.episode.num_segments == 1
    end = len("<|im_end|>")
    assert rollout.episode.turn_rewards == (1 + end, 3 + end, 1 + end), "an action's text has the token that ends it"
    prompt = make_prompt(TOKENIZER).text
    assert rollout.episode.parts == {"seen": float(len(prompt + text))}


def test_what_reset_adds_to_the_prompt_stands_before_the_first_turn(agent: str) -> None:
    rollout, text = played(agent, "opened", "a", "b", "c")
    assert text.startswith("(three turns)a<|im_end|>")
    assert rollout.loss_mask is not None
    assert not rollout.loss_mask[: len(TOKENIZER.encode("(three turns)"))].any()


@pytest.mark.parametrize(
    ("source", "says_why"),
    [
        ("x = 1", "has no class AgentExecutor"),
        (
            "from openrlhf.utils.agent import AgentExecutorBase\nclass AgentExecutor(AgentExecutorBase): ...",
            "runs a loop of its own",
        ),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("1 / 0", "importing it raises ZeroDivisionError: division by zero"),
    ],
)
def test_other_files_are_refused(source: str, says_why: str, tmp_path: Path) -> None:
    file = tmp_path / "agent_func.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=re.escape(says_why)):
        describe(WorldSpec(environments=(f"openrlhf://{file}",)))


def test_it_stands_beside_no_tools_and_no_other_kind_of_environment(agent: str) -> None:
    beside_tools = WorldSpec(tools=(HERE + "add",), environments=(agent,))
    for spec in (beside_tools, WorldSpec(environments=(agent, HERE + "Guess"))):
        with pytest.raises(ConfigError, match="cannot stand beside tools or other kinds of environments"):
            describe(spec)


def test_names_have_options() -> None:
    assert with_options("Taxi-v4") == ("Taxi-v4", {})
    assert with_options("F?a=false&b=2&c=x") == ("F", {"a": False, "b": 2, "c": "x"})
    with pytest.raises(ValueError, match="no library chess; have gym, openenv, openrlhf"):
        load("chess://x")
