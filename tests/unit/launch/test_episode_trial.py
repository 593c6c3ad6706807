"""The dry run of one episode in `rlhf check`: a scripted policy, the user's code, and what would be learned from."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.cli import main as cli
from rlhf.config.rollout import RolloutSection
from rlhf.errors import ModelError
from rlhf.launch.agents import load_world
from rlhf.launch.episode_trial import EpisodeTrial, try_episode
from rlhf.types import Json, Message
from tests.integration.agent_model import CALCULATOR, TEMPLATE
from tests.tiny_models import make_policy
from tests.unit.environments.support import HERMES, byte_tokenizer, make_prompt

pytestmark = pytest.mark.timeout(120)

HERE = "tests.unit.environments.agent_tools:"


def tried(
    *, max_tokens: int = 2000, template: str = HERMES, row: dict[str, Json] | None = None, **settings: object
) -> EpisodeTrial:
    section = RolloutSection.model_validate(settings)
    world = load_world(section)
    assert world is not None
    tokenizer = byte_tokenizer(template)
    prompt = make_prompt(tokenizer, tools=world.worlds[0].tools, is_open=bool(section.environment))
    prompt.metadata.update(row or {})  # type: ignore[attr-defined]
    bounded = section.model_copy(update={"max_response_tokens": max_tokens})
    return try_episode(bounded, world, tokenizer, prompt, max_tokens=10_000)


def said(trial: EpisodeTrial) -> Sequence[Message]:
    return trial.rollout.episode.messages


def test_the_first_tool_is_called_with_made_up_arguments_and_only_own_tokens_count() -> None:
    trial = tried(tools=(HERE + "add", HERE + "double"))
    call, reply, last = said(trial)
    assert json.loads(call.content.split("\n")[1]) == {"name": "add", "arguments": {"a": 1}}
    assert (reply.role, reply.content, last.content) == ("tool", "2", "Yes.")
    rollout = trial.rollout
    assert rollout.loss_mask is not None
    learned = trial.tokenizer.decode(rollout.token_ids[rollout.loss_mask].tolist(), skip_special_tokens=False)
    assert learned == f"{call.content}<|im_end|>Yes.<|im_end|>"
    assert trial.line == (
        "rollout: a scripted policy tried row row 1: called add with made-up arguments; 2 turns, ended by answer; "
        "reward 0."
    )


def test_an_environment_hears_two_texts_at_most() -> None:
    trial = tried(environment=(HERE + "Troubled",), row={"fails": "never"})
    assert [message.content for message in said(trial)] == ["go", "Yes."]
    assert "1 turn, ended by terminated; reward 2." in trial.line
    relay = tried(environment=("configs.stories.relay:Relay",), max_turns=9, row={"openings": ["a", "b", "c", "d"]})
    assert relay.rollout.episode.num_turns <= 2


def test_what_fails_is_told_and_no_error() -> None:
    trial = tried(environment=(HERE + "Troubled",), row={"fails": "raises in step"})
    assert "The environment failed:" in trial.line
    assert "step() raised RuntimeError: broken" in trial.line
    late = tried(tools=(HERE + "wait",), environment_timeout_s=0.2)
    assert "1 call failed" in late.line


def test_a_reply_without_room_for_another_turn_shows_in_the_ending() -> None:
    assert "ended by max_tokens" in tried(tools=(HERE + "add",), max_tokens=70).line


def test_a_template_that_writes_no_calls_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"leaves out part of .*tool_calls"):
        tried(tools=(HERE + "add",), template=HERMES.replace("message.tool_calls", "false"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_policy(tmp_path / "model", vocab_size=100, chat_template=TEMPLATE)
    (tmp_path / "calculator.py").write_text(CALCULATOR)
    rows = [{"prompt": f"{n}+2", "answer": f"{n + 2}", "limit": 3} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


CHECK = (
    *("check", "grpo", "--policy.model", "model", "--data.path", "sums.jsonl", "--rollout.engine", "transformers"),
    *("--rollout.max-prompt-tokens", "272", "--rollout.max-response-tokens", "200"),
    *("--rollout.batch-size", "2", "--train.batch-size", "16"),
)


def test_check_prints_an_episode_with_the_learned_tokens_marked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*CHECK, "--rollout.tools", "calculator.py:add", "--reward.rules", "number"]) == 0
    output = capsys.readouterr().out
    assert "rollout: a scripted policy tried row sums.jsonl:" in output
    call = '«<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call></s>»'
    assert f"{call}\n<s>tool\n2</s>\n<s>assistant\n«Yes.</s>»\n" in output
    assert "one episode of a scripted policy" in output
    assert output.endswith("No mistake was found.\n")


def test_check_in_color_has_no_marks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert cli.main([*CHECK, "--rollout.environment", "calculator.py:Teacher"]) == 0
    output = capsys.readouterr().out
    assert "trained tokens are in color" in output
    assert "«" not in output
    assert "\x1b[1;32mYes.\x1b[0m\x1b[1;7;32m</s>\x1b[0m" in output
