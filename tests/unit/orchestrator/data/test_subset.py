"""A data set that has several subsets: one is named."""

from pathlib import Path

import datasets
import pytest

from rlhf.config.data import DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data.layout import held_out_split, training_split
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.sources import read_rows
from tests.unit.orchestrator.data.data_support import complaints


@pytest.mark.parametrize(
    ("subset", "complaint"),
    [
        ("socratic", None),
        (None, "data.subset: openai/gsm8k has main, socratic; choose one (got None)."),
        ("mian", "data.subset: openai/gsm8k has main, socratic; choose one (got mian)."),
    ],
)
def test_a_subset_of_a_name_on_the_hub(
    subset: str | None, complaint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised is what `datasets` 4 raises."""

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        if subset is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample "
                "of usage:\n\t`load_dataset('gsm8k', 'main')`"
            )
        if subset not in ("main", "socratic"):
            raise ValueError(f"BuilderConfig '{subset}' not found. Available: ['main', 'socratic']")
        return datasets.Dataset.from_list([{"prompt": f"{subset}/{split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    problems = Problems(0)
    rows = read_rows("openai/gsm8k", training_split(DataSection(subset=subset)), problems)
    assert [row.values["prompt"] for row in rows] == ([] if complaint else ["socratic/train"])
    if complaint is None:
        problems.settle()
        (row,) = read_rows("openai/gsm8k", held_out_split(DataSection(subset=subset)), problems)
        assert row.values["prompt"] == "socratic/validation"
        return
    with pytest.raises(DataError) as error:
        problems.settle()
    assert complaints(error) == [complaint]


def test_a_subset_of_a_folder_is_what_its_card_calls_so(tmp_path: Path) -> None:
    for name in ("main", "other"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    problems = Problems(0)
    rows = read_rows(str(tmp_path), training_split(DataSection(subset="other")), problems)
    assert [row.values["prompt"] for row in rows] == ["other"]
    refused = {
        (tmp_path, None): "README.md describes several sets of files (main, other). Name one by data.subset.",
        (tmp_path, "third"): 'README.md describes no set of files "third" (have main, other).',
        (tmp_path / "main.jsonl", "main"): "main.jsonl is neither a hub data set nor a folder. Remove it.",
    }
    for (path, subset), said in refused.items():
        problems = Problems(0)
        read_rows(str(path), training_split(DataSection(subset=subset)), problems)
        with pytest.raises(DataError) as error:
            problems.settle()
        assert complaints(error)[0].endswith(said)
