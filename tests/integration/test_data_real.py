"""Data sets as their authors published them, and the `datasets` library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.commands import RowKind
from rlhf.errors import DataError
from rlhf.orchestrator.data import check_rows, load_prompts
from rlhf.types import FinishReason
from tests.unit.orchestrator.data.data_support import PLAIN, complaints, load_demonstrations, load_preferences, section

DATA = os.environ.get("RLHF_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="RLHF_TEST_DATA is not set")
FOLDER = Path(DATA or ".") / "data"
HH = FOLDER / "hh-rlhf" / "harmless-base-test.jsonl.gz"


@needs_data
def test_gsm8k_gives_every_question_with_its_solution_as_label() -> None:
    split = load_prompts(section(FOLDER / "gsm8k" / "*.jsonl", split="all", eval_fraction=0.1), PLAIN, 2000)
    assert (len(split.train) + len(split.held_out), split.dropped) == (7473 + 1319, {})
    assert not {prompt.text for prompt in split.train} & {prompt.text for prompt in split.held_out}
    assert all(prompt.label is not None and "####" in prompt.label for prompt in split.train)


@needs_data
def test_gsm8k_test_set_gives_demonstrations_that_end() -> None:
    path = FOLDER / "gsm8k" / "test.jsonl"
    split = load_demonstrations(section(path, prompt_format="Q: {prompt}\nA: ", max_tokens=3000), PLAIN)
    assert len(split.train) == 1319
    assert {group.responses[0].token_ids[-1] for group in split.train} == {PLAIN.eos_token_id}
    assert all(group.prompt.text.endswith("\nA: ") for group in split.train)


@needs_data
def test_hh_rlhf_gives_pairs_with_a_shared_prompt_and_names_its_warts() -> None:
    with pytest.raises(DataError) as error:
        check_rows(section(HH), RowKind.PREFERENCES)
    assert [line.split(": ", 1)[1] for line in complaints(error)] == ["the response of chosen is empty."] * 4
    split = load_preferences(section(HH, max_tokens=2000, overlong="truncate", max_bad_rows=4), PLAIN)
    assert len(split.train) + sum(split.dropped.values()) == 2312
    assert split.dropped["wrong"] == 4
    for group in split.train:
        assert group.prompt.text.startswith("\n\nHuman:")
        assert group.prompt.text.endswith("\n\nAssistant:")
        assert group.texts[0] != group.texts[1]
        assert max(len(group.prompt.token_ids) + len(rollout.token_ids) for rollout in group.responses) <= 2000
    ends = {rollout.finish_reason for group in split.train for rollout in group.responses}
    assert ends == {FinishReason.STOP, FinishReason.LENGTH}


def test_datasets_folders_are_read_and_hub_names_looked_up(tmp_path: Path) -> None:
    """In a process of its own, because `datasets` takes seconds to import and reads its offline switch then."""
    code = """
import sys
from datasets import Dataset, DatasetDict
from rlhf.config.data import DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data.layout import training_split
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.sources import read_rows

Dataset.from_list([{"prompt": "a"}]).save_to_disk("one")
two = {"train": Dataset.from_list([{"prompt": "b"}]), "test": Dataset.from_list([{"prompt": "c"}])}
DatasetDict(two).save_to_disk("two")
for path, split in (("one", "train"), ("two", "test"), ("two", "nope"), ("someone/nothing", "train")):
    problems = Problems(0)
    rows = read_rows(path, training_split(DataSection(split=split)), problems)
    print([(row.where, row.values["prompt"]) for row in rows])
    try:
        problems.settle()
    except DataError as error:
        print(error)
"""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "[('one:1', 'a')]",
        "[('two:1', 'c')]",
        "[]",
        'data.split: two has no split "nope" (have train, test).',
    ]
    assert lines[4] == "[]"
    assert lines[5].startswith("data: someone/nothing matches no file, and no such data set can be loaded (")
    assert len(lines) == 6
