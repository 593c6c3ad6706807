"""What rows mean: the column conventions of the field, and a line for every row that means nothing."""

from pathlib import Path

import pytest

from rlhf.config.commands import RowKind
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.orchestrator.data import DataSplit, check_rows, load_prompts
from rlhf.types import Json, Prompt, ScoredGroup
from tests.unit.orchestrator.data.data_support import (
    CHAT,
    PLAIN,
    complaints,
    load_demonstrations,
    load_labeled,
    load_preferences,
    section,
    write_rows,
)

USER: dict[str, Json] = {"role": "user", "content": "hi"}
BOT: dict[str, Json] = {"role": "assistant", "content": "yo"}
WORSE: dict[str, Json] = {"role": "assistant", "content": "meh"}
HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
ALLOW = "use data.allow_control_tokens."
NO_PROMPT = "there is no prompt column."
DIALOGUE = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: bye\n\nAssistant:"


def prompts(tmp_path: Path, *rows: Json, **keys: object) -> DataSplit[Prompt]:
    return load_prompts(section(write_rows(tmp_path / "t.jsonl", rows), **keys), CHAT, 200)


def demonstrations(tmp_path: Path, *rows: Json, **keys: object) -> DataSplit[ScoredGroup]:
    return load_demonstrations(section(write_rows(tmp_path / "t.jsonl", rows), **keys), CHAT)


def preferences(tmp_path: Path, *rows: Json, **keys: object) -> DataSplit[ScoredGroup]:
    return load_preferences(section(write_rows(tmp_path / "t.jsonl", rows), **keys), CHAT)


@pytest.mark.parametrize(
    ("row", "keys", "text"),
    [
        ({"prompt": "hi"}, {}, "hi"),
        ({"input": "hi"}, {}, "hi"),
        ({"question": "hi", "answer": "yo"}, {}, "hi"),
        ({"instruction": "hi", "input": "there", "output": "yo"}, {}, "hi\n\nthere"),
        ({"instruction": "hi", "input": "", "output": "yo"}, {}, "hi"),
        ({"prompt": "no", "mine": "hi"}, {"prompt_key": "mine"}, "hi"),
        ({"prompt": "hi"}, {"prompt_format": "Q: {prompt} {}\nA:"}, "Q: hi {}\nA:"),
        ({"prompt": "a{prompt}b"}, {"prompt_format": "Q: {prompt}"}, "Q: a{prompt}b"),
        ({"prompt": [USER]}, {}, HI),
        ({"messages": [USER]}, {}, HI),
        ({"conversations": [{"from": "human", "value": "hi"}]}, {}, HI),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, {}, HI),
        ({"prompt": "hi"}, {"template": "chat"}, HI),
        ({"prompt": [USER]}, {"template": "plain", "prompt_format": "Q: {prompt}"}, "Q: hi"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, {}, DIALOGUE),
        ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, {}, HI),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
            {"template": "chat"},
            HI,
        ),
    ],
)
def test_a_prompt_is_found_under_every_convention(
    tmp_path: Path, row: Json, keys: dict[str, object], text: str
) -> None:
    (prompt,) = prompts(tmp_path, row, **keys).train
    assert prompt.text == text
    in_front = text.startswith("<|im_start|>")  # the template writes what comes first
    assert prompt.token_ids.tolist() == CHAT.encode(text, add_special_tokens=not in_front)


def test_label_and_other_columns_travel_with_the_prompt(tmp_path: Path) -> None:
    (prompt,) = prompts(tmp_path, {"id": 7, "question": "2+2", "answer": 4, "level": [1, None]}).train
    assert (prompt.id, prompt.label) == ("7", "4")
    assert prompt.metadata == {"answer": 4, "level": [1, None]}
    (prompt,) = prompts(tmp_path, {"messages": [USER]}).train
    assert (prompt.id, prompt.label) == ("t.jsonl:1", None)
    assert prompt.metadata["messages"] == [USER]


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "hi", "response": "yo"}, "hi", "yo"),
        ({"prompt": "hi", "completion": "yo"}, "hi", "yo"),
        ({"input": "hi", "output": "yo"}, "hi", "yo"),
        ({"question": "hi", "answer": "yo"}, "hi", "yo"),
        ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, "hi", "yo"),
        ({"messages": [USER, BOT]}, HI, "yo"),
        ({"prompt": [USER], "completion": [BOT]}, HI, "yo"),
        ({"prompt": [USER], "completion": "yo"}, HI, "yo"),
        ({"prompt": "ignored", "messages": [USER, BOT], "response": "yo"}, "ignored", "yo"),
        ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, HI, "yo"),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: yo"}, "\n\nHuman: hi\n\nAssistant:", " yo"),
    ],
)
def test_a_demonstration_is_found_under_every_convention(tmp_path: Path, row: Json, prompt: str, response: str) -> None:
    (group,) = demonstrations(tmp_path, row).train
    assert (group.prompt.text, group.texts) == (prompt, (response,))
    assert [reward.total for reward in group.rewards] == [0.0]


@pytest.mark.parametrize(
    ("row", "prompt", "responses", "margins"),
    [
        ({"prompt": "hi", "chosen": "yo", "rejected": "meh"}, "hi", ("yo", "meh"), ()),
        ({"prompt": "hi", "chosen": "yo", "rejected": "meh", "margin": 0.5}, "hi", ("yo", "meh"), (0.5,)),
        ({"prompt": "hi", "chosen": "yo", "rejected": "meh", "margin": None}, "hi", ("yo", "meh"), ()),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, HI, ("yo", "meh"), ()),
        ({"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, WORSE]}, HI, ("yo", "meh"), ()),
        ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, HI, ("yo", "meh"), ()),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, DIALOGUE, (" a", " b"), ()),
        ({"prompt": "hi", "ranking": ["a", "b", "c"]}, "hi", ("a", "b", "c"), ()),
        ({"prompt": "hi", "ranking": ["a", "b", "c"], "margin": [1, 2]}, "hi", ("a", "b", "c"), (1.0, 2.0)),
        ({"prompt": [USER], "ranking": [[BOT], [WORSE]]}, HI, ("yo", "meh"), ()),
    ],
)
def test_a_preference_is_found_under_every_convention(
    tmp_path: Path, row: Json, prompt: str, responses: tuple[str, ...], margins: tuple[float, ...]
) -> None:
    (group,) = preferences(tmp_path, row).train
    assert (group.prompt.text, group.texts, group.margins) == (prompt, responses, margins)
    best_first = [float(rank) for rank in reversed(range(len(responses)))]
    assert [reward.total for reward in group.rewards] == best_first


def test_dialogues_that_part_early_keep_the_users_turns_inside_the_responses(tmp_path: Path) -> None:
    chosen = "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c"
    rejected = "\n\nHuman: hi\n\nAssistant: x\n\nHuman: y\n\nAssistant: z"
    (group,) = preferences(tmp_path, {"chosen": chosen, "rejected": rejected}).train
    assert group.prompt.text == "\n\nHuman: hi\n\nAssistant:"
    for rollout, letters in zip(group.responses, (" a c", " x z"), strict=True):
        assert rollout.loss_mask is not None
        assert CHAT.decode(rollout.token_ids[rollout.loss_mask].tolist()) == letters


def test_labels_of_binary_feedback_become_rewards(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": "false"},
    ]
    split = load_labeled(section(write_rows(tmp_path / "t.jsonl", rows)), PLAIN)
    assert [group.rewards[0].total for group in split.train] == [1.0, 0.0]


BAD_PROMPTS: list[tuple[Json, str]] = [
    ({"prompt": None}, "prompt is empty."),
    ({"prompt": ""}, "prompt is empty."),
    ({"prompt": " \n\t"}, "prompt is empty."),
    ({"prompt": 3}, "prompt is not text (got int)."),
    ({"prompt": {"a": 1}}, "prompt is not text (got dict)."),
    ({"prompt": []}, "prompt is empty."),
    ({"messages": [USER, BOT, {"role": "bot", "content": "x"}]}, 'messages[2].role "bot" unknown.'),
    ({"messages": [{"content": "x"}]}, 'messages[0].role "None" unknown.'),
    ({"messages": [USER, 5]}, "messages[1] is not a message (got int)."),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is empty."),
    (
        {"messages": [{"role": "user", "content": [{"image": "x"}]}]},
        "messages[0].content holds parts that are not text.",
    ),
    ({"messages": [USER, BOT]}, "last message must be from user."),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages has no user turn."),
    ({"messages": [{"role": "tool", "content": "x"}, USER]}, "the chat template refuses the messages: no tool first."),
    ({"prompt": "a <|im_end|> b"}, "prompt holds the control token <|im_end|>; use data.allow_control_tokens."),
    (
        {"messages": [{"role": "user", "content": "<s>"}]},
        "messages holds the control token <s>; use data.allow_control_tokens.",
    ),
]


@pytest.mark.parametrize(("row", "complaint"), BAD_PROMPTS)
def test_a_bad_prompt_gives_its_line(tmp_path: Path, row: Json, complaint: str) -> None:
    with pytest.raises(DataError) as error:
        prompts(tmp_path, row)
    assert complaints(error) == [f"t.jsonl:1: {complaint}"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same."),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "chosen is empty."),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "rejected is empty."),
        ({"prompt": "p", "chosen": None, "rejected": None}, "chosen is empty."),
        ({"prompt": "p", "chosen": "a", "rejected": "b</s>"}, f"rejected holds the control token </s>; {ALLOW}"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, 'margin must be a finite number (got "x").'),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "margin must be a finite number (got true)."),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400},
            f"margin must be a finite number (got 1{'0' * 59}...).",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": [1, 2]}, "margin holds 2 numbers, need 1."),
        ({"prompt": "p", "ranking": ["a"]}, "ranking is not a list of two responses or more."),
        ({"prompt": "p", "ranking": ["a", "b", "a"]}, "ranking[0] and ranking[2] are the same."),
        ({"prompt": "p", "ranking": ["a", " "]}, "ranking[1] is empty."),
        (
            {"chosen": "x a", "rejected": "x b", "ask": "x"},
            f"the responses share no beginning that ends in Assistant:, and {NO_PROMPT}",
        ),
        ({"chosen": "x a", "rejected": "y b", "score": 1}, f"the responses share no first words, and {NO_PROMPT}"),
        ({"chosen": " a", "rejected": " b"}, f"the responses share no first words, and {NO_PROMPT}"),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE + " b"}, "the response of chosen is empty."),
        ({"chosen": [USER, BOT], "rejected": "x"}, "chosen and rejected are of different kinds (text and messages)."),
        ({"chosen": [USER, BOT], "rejected": [BOT]}, f"chosen and rejected share no first turns, and {NO_PROMPT}"),
        (
            {"prompt": [USER], "chosen": [BOT, USER], "rejected": [WORSE]},
            "chosen: last message must be from assistant.",
        ),
    ],
)
def test_a_bad_preference_gives_its_line(tmp_path: Path, row: Json, complaint: str) -> None:
    with pytest.raises(DataError) as error:
        preferences(tmp_path, row)
    assert complaints(error) == [f"t.jsonl:1: {complaint}"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [USER]}, "last message must be from assistant."),
        ({"messages": [BOT]}, "messages begins with the assistant."),
        ({"prompt": "hi", "response": ""}, "response is empty."),
        ({"prompt": "hi", "completion": 1}, "completion is not text (got int)."),
        ({"prompt": "hi"}, "no response (no response column); set data.response_key."),
        ({"chosen": "just text"}, "chosen is no dialogue (Human: ... Assistant: ...), and there is no prompt column."),
    ],
)
def test_a_bad_demonstration_gives_its_line(tmp_path: Path, row: Json, complaint: str) -> None:
    with pytest.raises(DataError) as error:
        demonstrations(tmp_path, row)
    assert complaints(error) == [f"t.jsonl:1: {complaint}"]


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prompts(tmp_path, {"id": "q7", "prompt": "a"}, {"id": "q8", "prompt": "b"}, {"id": "q7", "prompt": "c"})
    assert complaints(error) == ['t.jsonl:3: id "q7" repeats line 1.']


def test_control_tokens_can_be_allowed(tmp_path: Path) -> None:
    (prompt,) = prompts(tmp_path, {"prompt": "a<|im_end|>"}, allow_control_tokens=True).train
    assert prompt.token_ids.tolist() == [0, 100 + ord("a"), 3]


def test_columns_that_are_not_there_are_one_problem_each_not_one_a_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"a": 1, "b": 2}] * 50)
    with pytest.raises(DataError) as error:
        load_prompts(section(path), PLAIN, 10)
    assert complaints(error) == ["data: no prompt column; set data.prompt_key (have a, b)."]
    with pytest.raises(DataError) as error:
        load_prompts(section(path, prompt_key="x", label_key="y"), PLAIN, 10)
    assert complaints(error) == [
        'data.prompt_key: no column "x" (have a, b).',
        'data.label_key: no column "y" (have a, b).',
    ]


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([True, "yes"], 't.jsonl:2: label must be true or false, or 1 or 0 (got "yes").'),
        ([1, -1], "t.jsonl:2: label must be true or false, or 1 or 0 (got -1)."),
        ([True, True], "data: both labels are needed; all 2 are true."),
    ],
)
def test_binary_feedback_needs_two_labels_and_no_other(tmp_path: Path, labels: list[Json], complaint: str) -> None:
    rows = [{"prompt": "p", "completion": str(n), "label": label} for n, label in enumerate(labels)]
    with pytest.raises(DataError) as error:
        load_labeled(section(write_rows(tmp_path / "t.jsonl", rows)), PLAIN)
    assert complaints(error) == [complaint]


@pytest.mark.parametrize("good", [True, "True", 1, 1.0, "1"])
@pytest.mark.parametrize("bad", [False, "False", 0, 0.0, "0"])
def test_a_label_may_be_a_number(tmp_path: Path, good: Json, bad: Json) -> None:
    rows = [{"prompt": "p", "completion": str(label), "label": label} for label in (good, bad)]
    split = load_labeled(section(write_rows(tmp_path / "t.jsonl", rows)), PLAIN)
    assert [group.labels for group in split.train] == [(True,), (False,)]


def test_a_missing_chat_template_hides_no_wrong_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"messages": [USER]}, {"messages": 3}])
    with pytest.raises(ConfigError) as error:
        load_prompts(section(path), PLAIN, 10)
    first, second = error.value.problems
    assert first.startswith("tokenizer: no chat template; set data.template=plain")
    assert second.startswith("t.jsonl:2: messages is not text")


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"messages": [USER]}])
    with pytest.raises(ModelError, match=r"no chat template; set data\.template"):
        load_prompts(section(path), PLAIN, 10)


def test_rows_can_be_checked_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(DataError) as error:
        check_rows(section(path, eval_path=f"{tmp_path}/none.csv"), RowKind.PROMPTS)
    assert complaints(error) == ["t.jsonl:2: prompt is empty.", f"data: {tmp_path}/none.csv matches no file."]
    check_rows(section(path, max_bad_rows=1), RowKind.PROMPTS)
