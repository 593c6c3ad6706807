"""What is recorded of a response."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.orchestrator.run.files import write_rows
from rlhf.orchestrator.run.responses import mean_advantages, response_rows
from rlhf.types import Experience, Json, LearnedSequence, Message, Reward, Signal
from tests.unit.orchestrator.support import as_sampled, given_group


def learned(advantages: list[float], mask: list[bool]) -> LearnedSequence:
    return LearnedSequence(
        token_ids=np.arange(len(mask), dtype=np.int64),
        loss_mask=np.array(mask),
        signals={Signal.ADVANTAGES: np.array(advantages, dtype=np.float32)},
    )


def test_a_row_holds_what_explains_its_reward() -> None:
    group = given_group(1, ["ab", "a"], [1.0, 0.0])
    group = replace(group, prompt=replace(group.prompt, label="c", metadata={"difficulty": 3}))
    group = replace(group, rewards=(Reward(total=1.0, parts={"rule": 2.0}), group.rewards[1]))
    groups = [as_sampled(group), as_sampled(given_group(1, ["b"], [0.5]))]
    rows = list(response_rows(4, groups, {"r1-0": 0.25}))
    assert rows[0] == {
        "step": 4,
        "group": 0,
        "prompt_id": "p1",
        "prompt": group.prompt.text,
        "label": "c",
        "columns": {"difficulty": 3},
        "response": "ab",
        "reward": 1.0,
        "parts": {"rule": 2.0},
        "advantage": 0.25,
        "finish_reason": "stop",
        "num_tokens": 3,
        "weight_version": 0,
    }
    assert [(row["group"], row["advantage"]) for row in rows] == [(0, 0.25), (0, None), (1, 0.25)]


def test_a_row_of_several_turns_shows_them_and_no_times() -> None:
    group = as_sampled(given_group(1, ["ab"], [1.0]))
    episode = Episode(
        messages=(Message(role="assistant", content="a"), Message(role="tool", content="b", fields={"name": "add"})),
        ending=Ending.MAX_TURNS,
        num_turns=1,
        calls={"add": 1},
        num_calls=1,
        turn_rewards=(0.5,),
        world_s=3.0,
    )
    (rollout,) = group.rollouts
    several = EpisodeRollout.of(rollout, episode)
    (row,) = response_rows(1, [replace(group, responses=(several,))], {})
    assert row["episode"] == {
        "messages": [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b", "name": "add"}],
        "ending": "max_turns",
        "calls": {"add": 1},
        "num_failed_calls": 0,
        "reward": 0.5,
        "failure": "",
    }
    json.dumps(row, allow_nan=False)


def test_a_response_without_a_score_is_json_of_any_reader() -> None:
    group = as_sampled(given_group(1, ["a"], [math.nan]))
    group = replace(group, rewards=(Reward(total=math.nan, parts={"rule": math.inf}),))
    (row,) = response_rows(1, [group], {})
    assert (row["reward"], row["parts"]) == (None, {"rule": None})
    json.dumps(row, allow_nan=False)


def test_an_advantage_is_the_mean_over_the_learned_tokens() -> None:
    experiences = [
        Experience(id="a", sequences=(learned([0.0, 9.0, 1.0, 2.0], [False, False, True, True]),)),
        Experience(id="masked", sequences=(learned([0.0, 1.0], [False, False]),)),
        Experience(id="pair", sequences=(learned([1.0], [True]), learned([2.0], [True]))),
        Experience(id="sft", sequences=(LearnedSequence(token_ids=np.zeros(1, np.int64), loss_mask=np.array([True])),)),
    ]
    assert mean_advantages(experiences) == {"a": 1.5}


def test_a_mean_advantage_is_that_of_numpy() -> None:
    """Bit for bit."""
    draw = np.random.default_rng(0)
    for number in draw.integers(1, 3000, size=50).tolist():
        advantages = draw.normal(size=number).astype(np.float32)
        sequence = learned(advantages.tolist(), [True] * number)
        assert mean_advantages([Experience(id="a", sequences=(sequence,))]) == {"a": float(advantages.mean())}


def test_rows_are_written_as_they_come_and_seen_when_all_are_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    seen = []

    def rows() -> Iterator[dict[str, Json]]:
        for number in range(3):
            seen.append((file.exists(), len(list(file.parent.iterdir()))))
            yield {"number": number, "text": "é"}

    write_rows(file, rows())
    assert seen == [(False, 1)] * 3
    assert file.read_text() == "".join(json.dumps({"number": n, "text": "é"}) + "\n" for n in range(3))
    assert list(file.parent.iterdir()) == [file]
