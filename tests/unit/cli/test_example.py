"""`rlhf example stories`: what the CPU configs use, the same each time."""

import json
import random
from pathlib import Path

import pytest

from configs.stories import rewards
from rlhf.cli.example import make_stories
from rlhf.cli.stories import JOYFUL_WORDS, demonstrations, joy_of, labeled, openings, pairs
from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from rlhf.orchestrator.data.load import check_rows
from tests.unit.planning.test_snapshots import command_for

ROOT = Path(__file__).parents[3]
CPU_CONFIGS = sorted((ROOT / "configs").glob("*_stories_cpu.yaml"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "stories"
    make_stories(folder, 0)
    return folder


def test_the_same_seed_makes_the_same_files(made: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    make_stories(again, 0)
    make_stories(other, 1)
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file() and path.name != "sft.yaml"]
    assert {path.name for path in files} >= {"pairs.jsonl", "labeled.jsonl", "openings.jsonl", "model.safetensors"}
    for path in files:
        assert (made / path).read_bytes() == (again / path).read_bytes(), path
    assert (made / "pairs.jsonl").read_bytes() != (other / "pairs.jsonl").read_bytes()
    assert (made / "base/model.safetensors").read_bytes() != (other / "base/model.safetensors").read_bytes()


def test_a_second_example_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="was not made by this command"):
        make_stories(tmp_path / "stories", 0)
    (tmp_path / "stories" / "stories.json").write_text("{}")
    make_stories(tmp_path / "stories", 0)
    assert not (tmp_path / "stories" / "mine.txt").exists()


@pytest.mark.parametrize("path", CPU_CONFIGS, ids=lambda path: path.stem)
def test_a_cpu_config_names_what_the_example_makes(path: Path, made: Path) -> None:
    config = load_config(command_for(path), [str(path)], {})
    assert config.models["policy"].model == "runs/stories/sft/model"
    assert config.data.path is not None
    rows = Path(config.data.path)
    if rows.parts[0] == "runs":
        assert (made / rows.relative_to("runs/stories")).is_file()
    else:
        shipped, own = ((folder / rows.name).read_text().splitlines() for folder in ((ROOT / rows).parent, made))
        assert sorted(shipped) == sorted(own)


def test_there_are_seven_cpu_configs() -> None:
    assert len(CPU_CONFIGS) == 7
    assert not any("RLHF_TEST_DATA" in path.read_text() for path in CPU_CONFIGS)


def test_rows_can_be_read_as_what_they_are(made: Path) -> None:
    kinds = {
        "demonstrations": RowKind.DEMONSTRATIONS,
        "pairs": RowKind.PREFERENCES,
        "labeled": RowKind.LABELED,
        "openings": RowKind.PROMPTS,
    }
    for name, kind in kinds.items():
        assert check_rows(DataSection(path=str(made / f"{name}.jsonl")), kind).records


def test_joy_is_that_of_the_reward() -> None:
    assert JOYFUL_WORDS <= rewards.JOYFUL
    shown = demonstrations(4, random.Random(0))
    for row in shown:
        expected = min(1.0, rewards.WORDS_PER_JOY * joy_of(row["response"]))
        assert rewards.joy([row["prompt"]], [row["response"]]) == [expected]


def test_stories_differ_in_joy_and_have_room_above() -> None:
    scores = rewards.joy([], [row["response"] for row in demonstrations(10, random.Random(0))])
    assert 0.2 < sum(scores) / len(scores) < 0.5
    assert {0.0, 1.0} < set(scores)


def test_the_chosen_story_is_the_more_joyful_one() -> None:
    rows = pairs(3, random.Random(0))
    assert len(rows) == 3 * len(openings())
    assert all(joy_of(row["chosen"]) > joy_of(row["rejected"]) for row in rows)
    both = labeled(rows)
    assert [row["label"] for row in both[:2]] == [True, False]
    assert json.dumps(both[0]["completion"]) == json.dumps(rows[0]["chosen"])
