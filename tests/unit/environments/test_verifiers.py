"""Environments of verifiers, made of its own classes. They are skipped where it is not installed."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from rlhf.config.environment_name import agent_name, environment_name
from rlhf.conversations.messages import parse_message
from rlhf.environments.engine import _by_content
from rlhf.environments.host import describe
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.types import Json, Prompt
from tests.unit.environments.playing import TOKENIZER, Play, call, says
from tests.unit.environments.support import Script
from tests.unit.environments.test_own_loops import own_text
from tests.unit.environments.test_transcript import contexts_of

pytestmark = pytest.mark.timeout(280)

SUMS = """
import verifiers.v1 as vf

__all__ = ["Sums"]


class Data(vf.TaskData):
    answer: int


class Sum(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.answer))

    @vf.reward(weight=-0.1)
    async def long(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) > 3)

    @vf.metric
    async def num_characters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class Config(vf.TasksetConfig):
    first: int = 1


class Sums(vf.Taskset[Sum, Config]):
    INFINITE = True

    def load(self):
        n = self.config.first
        while True:
            data = Data(prompt=f"{n}+{n}?", system_prompt="Add.", answer=2 * n)
            yield Sum(data, self.config.task)
            n += 1
"""
TOOLS = '''
import verifiers.v1 as vf


class Notes(vf.State):
    asked: list[str] = []


class Facts(vf.Toolset[vf.ToolsetConfig, Notes]):
    @vf.tool
    def look_up(self, town: str) -> str:
        """The river of a town."""
        self.state.asked.append(town)
        if town == "Atlantis":
            raise ValueError("no river")
        return {"Vienna": "Danube"}[town]


if __name__ == "__main__":
    Facts.run()
'''
RIVERS = """
import verifiers.v1 as vf
from river_tools import Facts, Notes

__all__ = ["Rivers"]


class River(vf.Task[vf.TaskData, Notes]):
    @classmethod
    def toolsets(cls, config):
        return [Facts(vf.ToolsetConfig())]

    @vf.reward
    async def named(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == "Danube" and trace.state.asked == ["Vienna"])


class Rivers(vf.Taskset[River, vf.TasksetConfig]):
    def load(self):
        return [River(vf.TaskData(prompt="The river of Vienna?"), self.config.task)]
"""
GAME = """
import verifiers.v1 as vf

__all__ = ["Numbers", "Guess"]


class Data(vf.TaskData):
    secret: int


class Number(vf.Task[Data]):
    pass


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"})


class Guess(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            turn = await talk.turn("Guess.")
            while not turn.terminated and turn.last_reply != str(task.data.secret):
                turn = await talk.turn("No.")
        talk.trace.record_reward("found", float(not turn.terminated))


class Numbers(vf.Taskset[Number, vf.TasksetConfig]):
    def load(self):
        return [Number(Data(name="a number", secret=4), self.config.task)]
"""
DUEL = """
import verifiers.v1 as vf
from numbers_game import Numbers

__all__ = ["Numbers", "Duel"]


class DuelConfig(vf.EnvConfig):
    white: vf.AgentConfig = vf.AgentConfig()
    black: vf.AgentConfig = vf.AgentConfig()


class Duel(vf.Env[DuelConfig]):
    async def run(self, task, agents):
        pass
"""
FILES = {"sums": SUMS, "river_tools": TOOLS, "rivers": RIVERS, "numbers_game": GAME, "duel": DUEL}
Made = Callable[..., Play]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments as packages that this process, its children and servers of tools can import."""
    pytest.importorskip("verifiers", reason="verifiers is not installed: pip install 'rlhf[verifiers]'")
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def env(installed: None, tmp_path: Path) -> Iterator[Made]:
    opened: list[Play] = []

    def make(what: str, script: Script, **settings: object) -> Play:
        """An environment, played on the first of its own rows."""
        settings = {"timeout_s": 200.0, "num_retries": 0, "on_error": "fail", **settings}
        one = Play(script, agent=f"verifiers://{what}", **settings)  # type: ignore[arg-type]
        opened.append(one)
        one.prompt = prompt_of(rows_of(what, tmp_path)[0])
        one.episodes._prompts = _by_content([one.prompt])
        return one

    yield make
    for one in opened:
        one.episodes.close()


def once(game: Play, name: str = "1/row 1/0") -> EpisodeRollout:
    """One episode. Importing verifiers takes long on a busy machine, in its processes too."""
    rollout = game.submit(name).result(240)
    assert isinstance(rollout, EpisodeRollout)
    return rollout


def rows_of(what: str, folder: Path, *arguments: str) -> list[dict[str, Json]]:
    from rlhf.environments.adapters.verifiers import main  # noqa: PLC0415  an extra

    out = folder / "tasks.jsonl"
    main([what, *(arguments or ("--num-rows", "1")), "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def turns_of(rollout: EpisodeRollout) -> tuple[Ending, int, float]:
    return rollout.episode.ending, rollout.episode.num_turns, rollout.episode.reward


def prompt_of(row: Mapping[str, Json]) -> Prompt:
    """A row's prompt as a run makes it."""
    written = row["prompt"]
    given: list[Json] = written if isinstance(written, list) else [{"role": "user", "content": written}]
    text = TOKENIZER.render([parse_message(one, "prompt") for one in given], add_generation_prompt=True, tools=())
    ids = np.array(TOKENIZER.encode(text), dtype=np.int64)
    return Prompt(id="row 1", token_ids=ids, text=text, metadata={"messages": given, "task": row["task"]})


def test_tasks_are_rows_with_the_prompt_that_their_environment_sends(installed: None, tmp_path: Path) -> None:
    first, second = rows_of("sums?taskset.first=7", tmp_path, "--num-rows", "2")
    assert first["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "7+7?"}]
    assert first["task"] == {"idx": 0, "prompt": "7+7?", "system_prompt": "Add.", "answer": 14}
    assert second["task"]["answer"] == 16  # type: ignore[index,call-overload]
    assert rows_of("numbers_game", tmp_path)[0]["prompt"] == "a number", "its environment opens the conversation"


def test_one_turn_is_scored_by_the_rewards_of_its_task(env: Made) -> None:
    """Scores are reported under their names, and weighted in the reward."""
    right = once(env("sums", says("2")))
    assert turns_of(right) == (Ending.ANSWER, 1, 2.0)
    assert right.episode.parts == {"right": 1.0, "long": 0.0, "num_characters": 1.0}
    assert own_text(right) == "2<|im_end|>"
    wrong = once(env("sums", says("eleven")))
    assert wrong.episode.reward == pytest.approx(-0.1)


def test_the_prompt_of_a_row_is_the_beginning_of_its_episode(env: Made) -> None:
    game = env("sums", says("2"))
    rollout = once(game)
    text = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert contexts_of(rollout, game.prompt) == [f"{text}[2<|im_end|>]"]
    (asked,) = game.engine.requests
    assert asked.prompt_token_ids.tolist() == game.prompt.token_ids.tolist()


def test_tools_of_a_task_are_called_and_their_state_is_scored(env: Made) -> None:
    script = says(call("facts_look_up", town="Vienna"), "Danube")
    game = env("rivers", script)
    rollout = once(game)
    assert turns_of(rollout) == (Ending.ANSWER, 2, 1.0)
    assert (rollout.episode.calls, rollout.episode.parts) == ({"facts_look_up": 1}, {"named": 1.0})
    segment = contexts_of(rollout, game.prompt)[-1]
    assert '"name": "facts_look_up"' in segment
    assert "<tool_response>\nDanube\n</tool_response>" in segment
    assert own_text(rollout) == f"{script('', 0)}<|im_end|>Danube<|im_end|>"


def test_what_a_tool_cannot_do_is_told_to_the_policy(env: Made) -> None:
    game = env("rivers", says(call("fly", to="Vienna"), call("facts_look_up", town="Atlantis"), "Oh."))
    rollout = once(game)
    assert turns_of(rollout) == (Ending.ANSWER, 3, 0.0)
    segment = contexts_of(rollout, game.prompt)[-1]
    assert "error: no tool fly; have facts_look_up" in segment
    assert "no river" in segment


def test_an_environment_that_speaks_goes_on_with_the_same_tokens(env: Made) -> None:
    game = env("numbers_game", says("1", "2", "4"))
    rollout = once(game)
    assert turns_of(rollout) == (Ending.ANSWER, 3, 1.0)
    no = "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"
    assert contexts_of(rollout, game.prompt)[-1].endswith(f"[1<|im_end|>]{no}[2<|im_end|>]{no}[4<|im_end|>]")


@pytest.mark.parametrize(
    ("what", "limits", "turns"), [("numbers_game", {"max_turns": 2}, 2), ("numbers_game?player.max_turns=3", {}, 3)]
)
def test_an_episode_that_reaches_a_limit_is_scored_and_truncated(
    env: Made, what: str, limits: dict[str, int], turns: int
) -> None:
    """The run's own, or one of the environment's."""
    rollout = once(env(what, lambda seen, turn: "1", **limits))
    assert rollout.episode.num_turns == turns
    assert rollout.episode.ending in {Ending.MAX_TURNS, Ending.TRUNCATED}
    assert rollout.episode.parts == {"found": 0.0}


def test_a_row_of_another_kind_fails_with_what_it_lacks(env: Made) -> None:
    game = env("sums", says("2"), on_error="drop")
    del game.prompt.metadata["task"]  # type: ignore[attr-defined]
    assert "the row has no task; make rows with python -m" in once(game).episode.failure
    game.prompt.metadata["task"] = {"prompt": "1+1?"}  # type: ignore[index]
    assert "answer Field required" in once(game, "1/row 1/1").episode.failure


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("no-such-thing", r"verifiers://no-such-thing: taskset 'no-such-thing' not found .*No module named"),
        ("sums?taskset.last=3", r"settings of sums: taskset\.last: "),
        ("sums?agent.runtime.type=moon", r"settings of sums: agent\.runtime"),
        ("duel", r"duel has the agents white, black; an environment of one agent is needed"),
        ("river_tools", r"defines no `__all__`"),
    ],
)
def test_what_cannot_be_played_is_refused(installed: None, what: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        describe(WorldSpec(agent=f"verifiers://{what}"))


def test_names_stand_in_the_setting_that_they_are_for() -> None:
    assert agent_name("verifiers://sums?agent.max_turns=2") == "verifiers://sums?agent.max_turns=2"
    with pytest.raises(ValueError, match=r'"verifiers" is for rollout\.agent; set verifiers://sums there'):
        environment_name("verifiers://sums")
    with pytest.raises(ValueError, match=r'"gym" is for rollout\.environment; set gym://Chess there'):
        agent_name("gym://Chess")
    with pytest.raises(ValueError, match=r'no library "verifier" \(have verifiers\)'):
        agent_name("verifier://sums")
