"""Environments of libraries that are extras. Tests of one that is not installed are skipped."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.environments.adapters import load
from rlhf.environments.environment import inspect_class
from rlhf.environments.host import describe
from rlhf.environments.spec import WorldSpec
from rlhf.errors import ConfigError

MISSING = "{} is not installed: pip install 'rlhf[{}]'"


def gym() -> None:
    pytest.importorskip("gymnasium", reason=MISSING.format("gymnasium", "gym"))


def made(name: str) -> Any:
    return inspect_class(load(name)).build()


def test_a_text_environment_is_drawn_and_played_by_its_last_number() -> None:
    gym()
    lake = made("gym://FrozenLake-v1?is_slippery=false")
    said = lake.reset(seed=1)
    assert "[S]FFF" in said, "where the player stands is marked in text, not in color"
    assert "HFFG" in said
    assert said.endswith("Say an action: a number from 0 to 3.")
    for action in (1, 1, 2, 2, 1):
        result = lake.step(f"I go 3, no: {action}")
        assert (result.reward, result.terminated) == (0.0, False)
        assert "(" in result.observation, "the drawing names the last action"
    assert lake.step("2").reward == 1.0
    lake.close()


def test_a_turn_without_an_action_asks_again_and_moves_nothing() -> None:
    gym()
    lake = made("gym://FrozenLake-v1?is_slippery=false")
    lake.reset(seed=1)
    for text in ("", "north", "7", "-1"):
        result = lake.step(text)
        assert (result.observation, result.info) == ("Say an action: a number from 0 to 3.", {"unread_actions": 1})
    assert lake.step("1").info["prob"] == 1


def test_what_is_observed_is_read_where_nothing_is_drawn_and_rows_begin_alike() -> None:
    gym()
    starts = [made("gym://Blackjack-v1").reset(messages=[{"role": "user", "content": text}]) for text in "aab"]
    assert starts[0] == starts[1]
    assert starts[0].startswith("(")
    assert len({made("gym://Blackjack-v1").reset(seed=seed) for seed in range(8)}) > 3


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gym://Chess-v9", r"Environment `Chess` doesn't exist"),
        ("gym://Pendulum-v1", "takes actions of Box, which are not read from text"),
        ("gym://FrozenLake-v1?nothing=1", "nothing"),
    ],
)
def test_what_cannot_be_played_is_refused(name: str, why: str) -> None:
    gym()
    with pytest.raises(ConfigError, match=why):
        describe(WorldSpec(environments=(name,)))


def test_tasks_are_rows_and_their_verifier_scores_answers(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason=MISSING.format("reasoning-gym", "reasoning-gym"))
    from rlhf.environments.adapters.reasoning_gym import main, score  # noqa: PLC0415  an extra

    out = tmp_path / "tasks.jsonl"
    main(["chain_sum", "leg_counting", "--num-rows", "5", "--seed", "3", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["task"]["name"] for row in rows] == ["chain_sum"] * 5 + ["leg_counting"] * 5
    for row in rows:
        assert "<answer>" in row["prompt"]
        assert score(f"I think <answer>{row['answer']}</answer>", row["task"]) == 1.0
        assert score(row["answer"], row["task"]) == 1.0
        assert score("<answer>no idea</answer>", row["task"]) < 0.5
    with pytest.raises(SystemExit):
        main(["no_such_task", "--out", str(out)])
