"""Tools and environments of a run, as far as they are known before anything starts."""

import json
from pathlib import Path

import pytest

from rlhf.config.commands import OnlineConfig
from rlhf.config.loading.load import load_config
from rlhf.config.rules.all_rules import problems_of
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.launch.data import RunData, load_data
from tests.unit.environments.support import FORGETFUL, HERMES, byte_tokenizer
from tests.unit.orchestrator.data.data_support import write_rows

HERE = "tests.unit.environments.agent_tools:"
REQUIRED = ("--policy.model", "m")


def config(folder: Path, *arguments: str, **row: object) -> OnlineConfig:
    """A config whose data is one row, unless `arguments` name another file."""
    rows = write_rows(folder / "rows.jsonl", [{"prompt": "Go.", "answer": "4", **row}])
    data = () if "--data.path" in arguments else ("--data.path", str(rows))
    given = () if "--rollout.environment" in arguments else ("--reward.rules", "number")
    found = load_config(
        "grpo",
        [
            *(*data, "--rollout.batch-size", "1", "--train.batch-size", "8"),
            *REQUIRED,
            *given,
            *arguments,
        ],
    )
    assert isinstance(found, OnlineConfig)
    return found


def loaded(folder: Path, *arguments: str, template: str = HERMES, **row: object) -> RunData:
    return load_data(config(folder, *arguments, **row), byte_tokenizer(template))


def test_tools_stand_in_the_prompt_and_texts_become_messages(tmp_path: Path) -> None:
    data = loaded(tmp_path, "--rollout.tools", HERE + "add")
    assert data.prompts is not None
    (prompt,) = data.prompts.train
    assert prompt.metadata["messages"] == [{"role": "user", "content": "Go."}]
    assert '"name": "add"' in prompt.text
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert data.tried == ["rollout: tools add."]


def test_a_template_that_drops_thoughts_is_told(tmp_path: Path) -> None:
    rewriting = FORGETFUL.replace("message.content.split('</think>')[-1]", "message.content | upper")
    data = loaded(tmp_path, "--rollout.environment", HERE + "Guess", template=rewriting, secret=4)
    assert data.tried[1].startswith(
        "rollout: the chat template rewrites a turn once another message follows (it writes"
    )
    assert data.tried[1].endswith("have room in train.max_tokens_per_micro_batch (4096).")


def test_prompts_of_an_environment_leave_open_who_speaks(tmp_path: Path) -> None:
    data = loaded(tmp_path, "--rollout.environment", HERE + "Guess", secret=4)
    assert data.prompts is not None
    assert data.prompts.train[0].text == "<|im_start|>user\nGo.<|im_end|>\n"
    assert data.prompts.train[0].metadata["secret"] == 4
    assert data.tried == [f"rollout: {HERE}Guess: steps through the turns."]


def test_a_column_that_an_environment_needs_is_missed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data: row .* has no secret, which .*Guess\.reset needs\.$"):
        loaded(tmp_path, "--rollout.environment", HERE + "Guess")
    loaded(tmp_path, "--rollout.environment", HERE + "Shelf")


@pytest.mark.parametrize(
    ("way", "held_out", "train"),
    [
        (("--rollout.environment", HERE + "Guess"), [5], [4, 6]),
        (("--rollout.agent", "tests.unit.environments.own_loops:calculates"), [5], [4, 6]),
        (("--rollout.tools", HERE + "add"), [5], []),
    ],
    ids=["environment", "loop", "tools"],
)
def test_rows_of_one_prompt_are_different_tasks_where_the_row_is_read(
    tmp_path: Path, way: tuple[str, ...], held_out: list[int], train: list[int]
) -> None:
    """A game may have the same prompt in all rows. Tools read none of the row: its prompt is the task."""
    rows = [{"id": f"{n}", "prompt": "Go.", "answer": "4", "secret": n} for n in (4, 5, 6)]
    train_path, eval_path = write_rows(tmp_path / "t.jsonl", rows), write_rows(tmp_path / "e.jsonl", [rows[1]])
    data = ("--data.path", str(train_path), "--data.eval_path", str(eval_path))
    found = config(tmp_path, *way, *data)
    if not train:
        with pytest.raises(DataError, match=r"no row of .* is left .* \(dropped: prompt also in eval_path: 3\)"):
            load_data(found, byte_tokenizer(HERMES))
        return
    prompts = load_data(found, byte_tokenizer(HERMES)).prompts
    assert prompts is not None
    assert [prompt.metadata["secret"] for prompt in prompts.train] == train
    assert [prompt.metadata["secret"] for prompt in prompts.held_out] == held_out


def test_an_environment_that_cannot_begin_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Troubled\.reset on row .*: raised RuntimeError: broken\.$"):
        loaded(tmp_path, "--rollout.environment", HERE + "Troubled", fails="raises in reset")
    with pytest.raises(ConfigError, match=r"Troubled\.reset on row .*: exited with code 3\.$"):
        loaded(tmp_path, "--rollout.environment", HERE + "Troubled", fails="dies in reset")
    loaded(tmp_path, "--rollout.environment", HERE + "Troubled", fails="raises in step")


BOTH = ("--rollout.environment", HERE + "Guess", "--rollout.environment", HERE + "Shelf")


def test_a_column_says_which_environment_a_row_is_for(tmp_path: Path) -> None:
    data = loaded(tmp_path, *BOTH, environment="Shelf")
    assert data.prompts is not None
    assert '"name": "put"' in data.prompts.train[0].text
    assert data.tried == [
        f"rollout: {HERE}Guess: steps through the turns; {HERE}Shelf: tools done, put, a reward at the end."
    ]
    guessing = loaded(tmp_path, *BOTH, environment=HERE + "Guess", secret=4)
    assert guessing.prompts is not None
    assert "put" not in guessing.prompts.train[0].text
    with pytest.raises(DataError, match=r"has no secret, which .*:Guess\.reset needs"):
        loaded(tmp_path, *BOTH, environment="Guess")


def test_a_name_with_options_is_one_text() -> None:
    lake = "gym://FrozenLake-v1?is_slippery=false"
    found = load_config("grpo", [*REQUIRED, "--data.path", "x", "--rollout.environment", lake])
    assert isinstance(found, OnlineConfig)
    assert found.rollout.environment == (lake,)
    for name in ("chess://x", "gym://", "openrlhf://no/such.py"):
        with pytest.raises(ConfigError, match=r"rollout\.environment"):
            load_config("grpo", [*REQUIRED, "--data.path", "x", "--rollout.environment", name])


def test_rows_of_no_environment_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'rows\.jsonl:1: environment is "Chess"; have Guess, Shelf\.'):
        loaded(tmp_path, *BOTH, environment="Chess")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: environment is missing, .*; have Guess, Shelf\."):
        loaded(tmp_path, *BOTH)
    loaded(tmp_path, "--rollout.environment", HERE + "Shelf", environment="anything")


def test_rows_with_tools_of_their_own_are_refused(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "other"}}]
    messages = [{"role": "user", "content": "Go."}]
    with pytest.raises(DataError, match="the tools of a run are those of"):
        loaded(tmp_path, "--rollout.tools", HERE + "add", prompt=messages, tools=tools)


def test_a_template_that_leaves_out_tools_is_refused(tmp_path: Path) -> None:
    silent = HERMES.replace("tool | tojson + '\\n'", "''")
    with pytest.raises(DataError, match=r"the chat template leaves out tools\[0\]"):
        loaded(tmp_path, "--rollout.tools", HERE + "add", template=silent)


def test_a_template_that_has_no_form_for_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="in a form that is not read here"):
        loaded(tmp_path, "--rollout.tools", HERE + "add", template=HERMES.replace("tool_call>", "call>"))


def test_what_cannot_be_loaded_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "--rollout.tools", HERE + "Guess", "--rollout.environment", HERE + "add")
    assert [text.partition(":")[0] for text in caught.value.problems] == ["rollout.tools.0", "rollout.environment"]


@pytest.mark.parametrize(
    ("arguments", "key", "text"),
    [
        (("--rollout.tools", HERE + "add", "--data.template", "plain"), "data.template", "need the chat template"),
        ((), "reward", "none given"),
        (
            ("--rollout.environment-processes", "2", "--reward.rules", "number"),
            "rollout.environment_processes",
            "no effect",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, arguments: tuple[str, ...], key: str, text: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Go."}])
    with pytest.raises(ConfigError) as caught:
        load_config("grpo", ["--data.path", str(rows), *REQUIRED, *arguments])
    assert any(key.replace("_", "-") in line.replace("_", "-") and text in line for line in caught.value.problems)


def test_the_rewards_of_an_environment_need_one(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps({"reward": {"sources": [{"type": "environment"}]}}))
    with pytest.raises(ConfigError, match=r"reward\.sources: the reward environment is .* set rollout\.environment"):
        load_config("grpo", [str(settings), "--data.path", "x", "--policy.model", "m"])


def test_an_environment_gives_the_reward_where_nothing_else_does(tmp_path: Path) -> None:
    alone = config(tmp_path, "--rollout.environment", HERE + "Shelf")
    assert [source.label for source in alone.reward.all_sources] == ["environment"]
    beside = config(tmp_path, "--rollout.environment", HERE + "Shelf", "--reward.rules", "number")
    assert [source.label for source in beside.reward.all_sources] == ["number"]
    assert alone.resolved() == alone


def test_a_process_reward_model_scores_no_turns_of_others(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(
        json.dumps({"reward": {"sources": [{"type": "prm", "model": "m"}]}, "rollout": {"tools": [HERE + "add"]}})
    )
    with pytest.raises(ConfigError, match="would score what tools returned"):
        load_config("grpo", [str(settings), "--data.path", "x", "--policy.model", "m"])


def test_a_config_with_tools_has_no_problems(tmp_path: Path) -> None:
    assert problems_of(config(tmp_path, "--rollout.tools", HERE + "double")) == []
