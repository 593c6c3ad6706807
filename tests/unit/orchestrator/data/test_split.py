"""Dividing by prompt, the fingerprint, and the order of rows."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import DataError
from rlhf.orchestrator.data import Order, load_prompts
from rlhf.orchestrator.data.split import divide, held_out_keys, prompt_key
from tests.unit.orchestrator.data.data_support import PLAIN, complaints, load_preferences, section, write_rows

PAIRS: list[dict[str, object]] = [
    {"id": "p1/a-b", "prompt": "p1", "chosen": "a", "rejected": "b"},
    {"id": "p1/a-c", "prompt": "p1", "chosen": "a", "rejected": "c"},
    {"id": "p2/d-e", "prompt": "p2", "chosen": "d", "rejected": "e"},
]


def test_golden_split_by_prompt() -> None:
    train, held_out = divide(PAIRS, [str(row["prompt"]) for row in PAIRS], {"p1"})
    assert (len(held_out), len(train)) == (2, 1)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_pairs_of_a_prompt_stay_on_one_side_whatever_the_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", PAIRS)
    sizes = set()
    for seed in range(8):
        split = load_preferences(section(path, eval_fraction=0.5, split_seed=seed), PLAIN)
        sides = [{group.prompt.text for group in side} for side in (split.train, split.held_out)]
        assert not sides[0] & sides[1]
        sizes.add((len(split.held_out), len(split.train)))
    assert sizes == {(2, 1), (1, 2)}


@given(st.lists(st.text(), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_fraction_of_the_prompts_is_held_out_and_never_all(texts: list[str], fraction: float, seed: int) -> None:
    keys = [prompt_key(text) for text in texts]
    distinct = len(set(keys))
    if distinct < 2:
        return
    held_out = held_out_keys(keys, fraction, seed)
    assert 1 <= len(held_out) < distinct
    assert abs(len(held_out) - fraction * distinct) <= 1
    assert held_out == held_out_keys(list(reversed(keys)), fraction, seed)


def test_the_same_prompts_are_held_out_of_every_kind_of_data(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(20)]
    pairs = write_rows(tmp_path / "p.jsonl", [{"prompt": t, "chosen": "a", "rejected": "b"} for t in texts])
    online = write_rows(tmp_path / "o.jsonl", [{"input": t} for t in reversed(texts)])
    first = load_preferences(section(pairs, eval_fraction=0.3), PLAIN)
    second = load_prompts(section(online, eval_fraction=0.3), PLAIN, 100)
    assert {group.prompt.text for group in first.held_out} == {prompt.text for prompt in second.held_out}
    assert len(second.held_out) == 6


def test_prompts_that_differ_in_spaces_and_case_stay_together(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ("Who  are you?", "who are you?\n", "Where?")]
    split = load_prompts(section(write_rows(tmp_path / "t.jsonl", rows), eval_fraction=0.5), PLAIN, 100)
    assert sorted((len(split.train), len(split.held_out))) == [1, 2]


def test_one_prompt_cannot_be_divided(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", PAIRS[:2])
    with pytest.raises(DataError) as error:
        load_preferences(section(path, eval_fraction=0.1), PLAIN)
    assert complaints(error) == ["data.eval_fraction: one prompt cannot be divided; set data.eval_path."]


def test_prompts_of_eval_path_leave_the_training_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": text} for text in "abc"])
    held_out = write_rows(tmp_path / "e.jsonl", [{"prompt": text} for text in "Bx"])
    split = load_prompts(section(path, eval_path=str(held_out)), PLAIN, 100)
    assert [prompt.text for prompt in split.train] == ["a", "c"]
    assert [prompt.text for prompt in split.held_out] == ["B", "x"]
    assert split.dropped == {"prompt also in eval_path": 1}
    with pytest.raises(DataError, match=r"left to train on \(dropped: prompt also in eval_path: 3\)\."):
        load_prompts(section(path, eval_path=str(path)), PLAIN, 100)


def test_the_fingerprint_follows_everything_that_is_learned_from(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"

    def fingerprint(rows: list[dict[str, object]], **keys: object) -> str:
        return load_preferences(section(write_rows(path, rows), **keys), PLAIN).fingerprint

    plain = fingerprint(PAIRS)
    assert plain == fingerprint(PAIRS)
    others = [
        fingerprint(PAIRS[::-1]),
        fingerprint(PAIRS[:2]),
        fingerprint([{**PAIRS[0], "chosen": "z"}, *PAIRS[1:]]),
        fingerprint([{**PAIRS[0], "margin": 1}, *PAIRS[1:]]),
        fingerprint([{**PAIRS[0], "topic": "x"}, *PAIRS[1:]]),
        fingerprint(PAIRS, prompt_format="Q: {prompt}"),
        fingerprint(PAIRS, eval_fraction=0.5),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_too_few_rows_for_a_batch_are_named(tmp_path: Path) -> None:
    split = load_preferences(section(write_rows(tmp_path / "t.jsonl", PAIRS)), PLAIN)
    split.require(3, "rollout.batch_size")
    with pytest.raises(DataError) as error:
        split.require(4, "rollout.batch_size")
    assert complaints(error) == ["data: 3 rows < rollout.batch_size 4. Lower rollout.batch_size or add rows."]


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 9),
    takes=st.lists(st.integers(0, 12), max_size=12),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_every_epoch_holds_every_row_once_whatever_the_batches(
    num_rows: int, takes: list[int], seed: int, shuffle: bool
) -> None:
    order = Order(range(num_rows), seed=seed, shuffle=shuffle)
    taken = [row for count in takes for row in order.take(count)]
    assert order.position == len(taken) == sum(takes)
    for start in range(0, len(taken), num_rows):
        counts = Counter(taken[start : start + num_rows])
        assert max(counts.values()) == 1
    continued = Order(range(num_rows), seed=seed, shuffle=shuffle)
    continued.position = order.position
    assert continued.take(25) == order.take(25)


@given(num_rows=st.integers(1, 300), batch_size=st.integers(1, 70))
def test_batches_of_an_epoch_read_every_row_once(num_rows: int, batch_size: int) -> None:
    order = Order(range(num_rows), seed=3)
    for _ in range(2):
        batches = [order.take_batch(batch_size) for _ in range(-(-num_rows // batch_size))]
        assert sorted(row for batch in batches for row in batch) == list(range(num_rows))
        assert order.position % num_rows == 0
    two = Order(range(65), seed=0)
    assert [len(two.take_batch(64)) for _ in range(4)] == [33, 32, 33, 32]


def test_epochs_and_seeds_differ_and_nothing_else_does() -> None:
    orders = [tuple(Order(range(50), seed=seed).take(50)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    two_epochs = Order(range(50), seed=0).take(100)
    assert two_epochs[:50] != two_epochs[50:]
    assert Order("abc", seed=3, shuffle=False).take(7) == list("abcabca")


def test_epoch_counts_whole_passes() -> None:
    order = Order("abc", seed=0)
    seen = []
    for _ in range(4):
        seen.append(order.epoch)
        order.take(2)
    assert seen == [0, 0, 1, 2]
    assert len(order) == 3


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Order([], seed=0)
