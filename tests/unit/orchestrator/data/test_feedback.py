"""Pairs read as two labels, and responses whose steps are labeled."""

from pathlib import Path

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.orchestrator.data import DataSplit
from rlhf.types import FinishReason, Json, ScoredGroup
from tests.unit.orchestrator.data.data_support import (
    CHAT,
    PLAIN,
    LetterTokenizer,
    complaints,
    load_labeled,
    load_steps,
    section,
    write_rows,
)

USER: dict[str, Json] = {"role": "user", "content": "hi"}


def labeled(tmp_path: Path, *rows: Json, **keys: object) -> DataSplit[ScoredGroup]:
    return load_labeled(section(write_rows(tmp_path / "t.jsonl", rows), **keys), PLAIN)


def steps(tmp_path: Path, *rows: Json, **keys: object) -> DataSplit[ScoredGroup]:
    return load_steps(section(write_rows(tmp_path / "t.jsonl", rows), **keys), CHAT)


def test_a_pair_is_a_good_response_and_a_bad_one_to_the_same_prompt(tmp_path: Path) -> None:
    good, bad = labeled(tmp_path, {"id": "q", "prompt": "p", "chosen": "a", "rejected": "b"}).train
    assert (good.texts, good.rewards[0].total, good.labels) == (("a",), 1.0, (True,))
    assert (bad.texts, bad.rewards[0].total, bad.labels) == (("b",), 0.0, (False,))
    assert good.prompt.text == bad.prompt.text == "p"
    ids = [group.responses[0].id for group in (good, bad)]
    assert ids == ["q#chosen/0", "q#rejected/0"]
    assert [group.prompt.id for group in (good, bad)] == [group.responses[0].prompt_id for group in (good, bad)]


def test_a_pair_without_a_prompt_column_is_two_labels_too(tmp_path: Path) -> None:
    row: Json = {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b", "margin": 2}
    good, bad = labeled(tmp_path, row).train
    assert good.prompt.text == bad.prompt.text == "\n\nHuman: hi\n\nAssistant:"
    assert (good.texts, bad.texts) == ((" a",), (" b",))
    assert good.margins == bad.margins == ()


def test_the_two_labels_of_a_pair_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows: list[Json] = [{"prompt": f"p{n // 2}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(40)]
    split = labeled(tmp_path, *rows, eval_fraction=0.3)
    held_out, train = ([group.prompt.text for group in side] for side in (split.held_out, split.train))
    assert len(held_out) == 24
    assert not set(held_out) & set(train)
    assert sum(group.rewards[0].total for group in split.held_out) == 12


def test_pairs_that_are_the_same_after_truncation_are_no_labels(tmp_path: Path) -> None:
    rows: list[Json] = [
        {"prompt": "p", "chosen": "xxxxa", "rejected": "xxxxb"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    split = labeled(tmp_path, *rows, max_tokens=5, overlong="truncate")
    assert [group.texts for group in split.train] == [("a",), ("b",)]
    assert split.dropped == {"responses the same once tokenized and cut": 1}


def test_rows_to_train_on_have_both_labels(tmp_path: Path) -> None:
    """Also after long rows were dropped, and some were held out."""
    good: list[Json] = [{"prompt": f"p{n}", "response": "a", "label": True} for n in range(3)]
    bad: list[Json] = [{"prompt": f"q{n}", "response": "a long one", "label": False} for n in range(2)]
    assert len(labeled(tmp_path, *good, *bad).train) == 5
    with pytest.raises(DataError) as dropped:
        labeled(tmp_path, *good, *bad, overlong="drop", max_tokens=8)
    assert complaints(dropped)[0].startswith(
        "data: both labels are needed; all 3 rows to train on are true (held out: 0 that are false; dropped: {'over"
    )
    one_bad = [labeled_by_seed(tmp_path, [*good, bad[0]], seed) for seed in range(8)]
    assert {line for lines in one_bad for line in lines if "(held out: 1 that are false" in line}
    assert [] in one_bad


def labeled_by_seed(tmp_path: Path, rows: list[Json], seed: int) -> list[str]:
    """What is said of rows of which a quarter is held out."""
    try:
        labeled(tmp_path, *rows, eval_fraction=0.25, split_seed=seed)
    except DataError as error:
        return list(error.problems)
    return []


def test_a_response_column_that_is_named_is_read_beside_pairs(tmp_path: Path) -> None:
    rows: list[Json] = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "said": f"c{n}", "label": bool(n)} for n in range(2)
    ]
    split = labeled(tmp_path, *rows, response_key="said")
    assert [(group.texts, group.rewards[0].total) for group in split.train] == [(("c0",), 0.0), (("c1",), 1.0)]


@pytest.mark.parametrize("labels", [[True, False, True], [1, 0, 1.0], ["+", "-", "+"]])
def test_steps_end_in_the_separator_and_the_mask_marks_their_ends(tmp_path: Path, labels: list[Json]) -> None:
    row: Json = {"prompt": "p", "completions": ["ab", "c\n", "de"], "labels": labels}
    (group,) = steps(tmp_path, row).train
    (rollout,) = group.responses
    assert group.texts == ("ab\nc\nde\n",)
    assert PLAIN.decode(rollout.token_ids.tolist()) == "ab\nc\nde\n"
    assert rollout.loss_mask is not None
    assert np.flatnonzero(rollout.loss_mask).tolist() == [2, 4, 7]
    assert rollout.step_labels == (1.0, 0.0, 1.0)
    assert group.rewards[0].total == pytest.approx(2 / 3)
    assert rollout.finish_reason is FinishReason.STOP


def test_steps_take_another_separator_shares_and_messages(tmp_path: Path) -> None:
    row: Json = {"prompt": [USER], "steps": ["ab", "c"], "step_labels": [0.25, 1]}
    (group,) = steps(tmp_path, row, step_separator=" ## ").train
    assert group.prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert group.texts == ("ab ## c ## ",)
    assert group.responses[0].step_labels == (0.25, 1.0)


def test_the_tokens_of_a_step_do_not_depend_on_the_next_one(tmp_path: Path) -> None:
    tokenizer = LetterTokenizer(merges=("\nb", "a\n"))
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}])
    (group,) = load_steps(section(path), tokenizer).train
    assert [tokenizer.decode([token]) for token in group.responses[0].token_ids.tolist()] == ["a\n", "b", "\n"]
    assert group.responses[0].loss_mask is not None
    assert group.responses[0].loss_mask.tolist() == [True, False, True]


def test_too_many_steps_are_cut_between_steps(tmp_path: Path) -> None:
    row: Json = {"prompt": "p", "completions": ["ab", "cd", "ef"], "labels": [True, True, False]}
    (group,) = steps(tmp_path, row, max_tokens=2 + 8, overlong="truncate").train
    (rollout,) = group.responses
    assert PLAIN.decode(rollout.token_ids.tolist()) == "ab\ncd\n"
    assert (rollout.step_labels, rollout.finish_reason) == ((1.0, 1.0), FinishReason.LENGTH)
    (exact,) = steps(tmp_path, row, max_tokens=2 + 6, overlong="truncate").train
    assert exact.responses[0].step_labels == (1.0, 1.0)
    (whole,) = steps(tmp_path, row, max_tokens=2 + 9).train
    assert whole.responses[0].step_labels == (1.0, 1.0, 0.0)
    with pytest.raises(DataError) as error:
        steps(tmp_path, row, max_tokens=10)
    assert complaints(error)[0].startswith("data: 1 of 1 rows exceed 10 tokens (data.max_tokens)")
    with pytest.raises(DataError, match="no row"):
        steps(tmp_path, row, max_tokens=4, overlong="truncate")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"completions": [], "labels": []}, "completions is not a list of steps."),
        ({"completions": "ab", "labels": [True]}, "completions is not a list of steps."),
        ({"completions": ["a", " "], "labels": [True, True]}, "completions[1] is empty."),
        ({"completions": ["a", 3], "labels": [True, True]}, "completions[1] is not text (got int)."),
        ({"completions": ["a", "b"], "labels": [True]}, "labels: 1 labels for 2 steps."),
        ({"completions": ["a"], "labels": True}, "labels: no list of labels for 1 steps."),
        ({"completions": ["a"], "labels": [None]}, "labels[0] must be true, false or from 0 to 1 (got null)."),
        ({"completions": ["a"], "labels": [2]}, "labels[0] must be true, false or from 0 to 1 (got 2)."),
        ({"completions": ["a"], "labels": ["1"]}, 'labels[0] must be true, false or from 0 to 1 (got "1").'),
        (
            {"completions": ["a", "b<|im_end|>"], "labels": [True, True]},
            "step 2 holds the control token <|im_end|>; use data.allow_control_tokens.",
        ),
    ],
)
def test_bad_steps_give_their_line(tmp_path: Path, row: dict[str, Json], complaint: str) -> None:
    with pytest.raises(DataError) as error:
        steps(tmp_path, {"prompt": "p", **row})
    assert complaints(error) == [f"t.jsonl:1: {complaint}"]


def test_step_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        steps(tmp_path, {"prompt": "p", "completion": "a", "label": True})
    assert complaints(error) == [
        "data: no steps (a column completions); set data.response_key (have prompt, completion, label).",
        "data: no labels of the steps; set data.label_key (have prompt, completion, label).",
    ]
