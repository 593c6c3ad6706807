"""Rounds through disk, with stages that only leave what the real ones leave."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.rounds import run_command, run_rounds
from rlhf.config.loading.load_tools import load_rounds
from rlhf.config.tools import RoundsConfig
from rlhf.errors import ConfigError
from rlhf.orchestrator.data.curation import Row
from rlhf.orchestrator.data.samples import SampleFile
from rlhf.orchestrator.run.files import write_json


class Stages:
    """Stands for the child processes. The samples' rewards say how many rounds their policy has been through."""

    def __init__(self, failing: str = "") -> None:
        self.commands: list[list[str]] = []
        self.failing = failing

    def __call__(self, arguments: Sequence[str]) -> int:
        self.commands.append(list(arguments))
        if self.failing and self.failing in " ".join(arguments):
            return 75
        match arguments[0]:
            case "sample":
                self._sample(Path(arguments[1]))
            case "curate":
                return main(list(arguments))
            case "train":
                run = Path(flag(arguments, "--run.dir"), flag(arguments, "--run.name"))
                run.mkdir()
                write_json(run / "status.json", {"status": "done"})
        return 0

    def _sample(self, file: Path) -> None:
        settings = yaml.safe_load(file.read_text())
        level = max(map(float, re.findall(r"round_(\d)", settings["model"])), default=0.0)
        rows: list[Row] = [
            {"id": f"q/{n}", "prompt": "q", "response": f"{settings['seed']} {n}", "reward": level + n}
            for n in range(3)
        ]
        ids = [[str(row["id"]) for row in rows]]
        with SampleFile.open(Path(settings["out"]), {"num_answers": 3}, ids) as out:
            out.append(rows)


def flag(arguments: Sequence[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def config(tmp_path: Path, method: str, *arguments: str) -> RoundsConfig:
    given = [method, "--model", "base", "--data.path", "p.jsonl", "--reward.function", "m:f", "--seed", "5"]
    return load_rounds([*given, "--folder", str(tmp_path / "out"), "--num-rounds", "2", *arguments], {})


def test_dpo_rounds_train_each_policy_on_pairs_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    assert run_rounds(config(tmp_path, "dpo", "--train", "dpo.yaml", "--min-margin", "0.5"), stages) == 0
    folder = tmp_path / "out"
    one, two = folder / "round_1", folder / "round_2"
    plain = ["--data.prompt-format", "{prompt}", "--data.template", "auto"]
    first, second = "base", str(one / "train" / "model")
    assert stages.commands == [
        ["sample", str(one / "sample.yaml")],
        ["curate", "pairs", "--min-margin", "0.5", str(one / "samples.jsonl"), "--out", str(one / "data.jsonl")],
        ["train", "dpo", "dpo.yaml", "--policy.model", first, "--reference.model", first, "--data.path",
         str(one / "data.jsonl"), *plain, "--run.dir", str(one), "--run.name", "train"],
        ["sample", str(two / "sample.yaml")],
        ["curate", "pairs", "--min-margin", "0.5", str(two / "samples.jsonl"), "--out", str(two / "data.jsonl")],
        ["train", "dpo", "dpo.yaml", "--policy.model", second, "--reference.model", second, "--data.path",
         str(two / "data.jsonl"), *plain, "--run.dir", str(two), "--run.name", "train"],
        ["sample", str(folder / "round_3" / "sample.yaml")],
    ]  # fmt: skip
    pairs = [json.loads(line) for line in (two / "data.jsonl").read_text().splitlines()]
    assert [(row["score_chosen"], row["score_rejected"]) for row in pairs] == [(3.0, 1.0)]
    summary = json.loads((folder / "rounds.json").read_text())["rounds"]
    assert [(row["round"], row["reward"], row["rows"]) for row in summary] == [(1, 1.0, 1), (2, 2.0, 1), (3, 3.0, None)]
    said = capsys.readouterr().out
    assert f"The last model is in {two / 'train' / 'model'}" in said


def test_expert_iteration_raises_its_threshold_and_samples_anew(tmp_path: Path) -> None:
    stages = Stages()
    settings = config(tmp_path, "sft", "--thresholds", "[1.0]", "--max-per-prompt", "2", "--start-from", "first")
    assert run_rounds(settings, stages) == 0
    curated = [command for command in stages.commands if command[0] == "curate"]
    assert [command[1:6] for command in curated] == [["rejection", "--threshold", "1.0", "--max-per-prompt", "2"]] * 2
    trained = [command for command in stages.commands if command[0] == "train"]
    assert [flag(command, "--policy.model") for command in trained] == ["base", "base"]
    assert all("--reference.model" not in command for command in trained)
    samples = [yaml.safe_load((tmp_path / "out" / f"round_{n}" / "sample.yaml").read_text()) for n in (1, 2, 3)]
    assert [one["seed"] for one in samples] == [5, 6, 7]
    assert [one["model"] for one in samples[:2]] == ["base", str(tmp_path / "out" / "round_1" / "train" / "model")]


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (
            ["--quantiles", "[0.25, 0.75]", "--keep-truncated"],
            ["rejection --quantile 0.25", "rejection --quantile 0.75"],
        ),
        ([], ["best-of-n", "best-of-n"]),
    ],
)
def test_rounds_choose_by_quantile_or_the_best(tmp_path: Path, arguments: list[str], chosen: list[str]) -> None:
    stages = Stages()
    assert run_rounds(config(tmp_path, "sft", *arguments), stages) == 0
    curated = [" ".join(command[1:]) for command in stages.commands if command[0] == "curate"]
    assert [line.startswith(begin) for line, begin in zip(curated, chosen, strict=True)] == [True, True]
    assert all(("--keep-truncated" in line) == ("--keep-truncated" in arguments) for line in curated)


def test_a_stage_that_failed_ends_the_command_and_is_the_first_one_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, "dpo")
    interrupted = Stages(failing="round_2 --run.name")
    assert run_rounds(settings, interrupted) == 75
    said = "rlhf: error: round 2: train ended with code 75. The same command continues from there.\n"
    assert capsys.readouterr().err == said
    again = Stages()
    assert run_rounds(settings, again) == 0
    assert [command[0] for command in again.commands] == ["train", "sample"]
    nothing = Stages()
    assert run_rounds(settings, nothing) == 0
    assert nothing.commands == []


def test_samples_that_are_not_all_there_are_sampled_on(tmp_path: Path) -> None:
    settings = config(tmp_path, "dpo")
    assert run_rounds(settings, Stages()) == 0
    samples = tmp_path / "out" / "round_3" / "samples.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(whole[:-10])
    again = Stages()
    assert run_rounds(settings, again) == 0
    assert [command[0] for command in again.commands] == ["sample"]
    assert samples.read_bytes() == whole


def test_training_that_has_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    settings = config(tmp_path, "dpo")
    assert run_rounds(settings, Stages(failing="train dpo")) == 75
    (tmp_path / "out" / "round_1" / "train" / "checkpoints" / "step_4").mkdir(parents=True)
    again = Stages(failing="train dpo")
    assert run_rounds(settings, again) == 75
    assert [command[-1] for command in again.commands] == ["--resume"]


def test_more_rounds_go_on_from_the_last_one(tmp_path: Path) -> None:
    assert run_rounds(config(tmp_path, "dpo"), Stages()) == 0
    more = Stages()
    assert run_rounds(config(tmp_path, "dpo", "--num-rounds", "3"), more) == 0
    assert [command[0] for command in more.commands] == ["curate", "train", "sample"]


def test_rounds_with_other_settings_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run_rounds(config(tmp_path, "dpo"), Stages()) == 0
    with pytest.raises(ConfigError) as error:
        run_rounds(config(tmp_path, "dpo", "--num-samples", "9", "--reference", "first"), Stages())
    advice = "Choose another --folder, or the same settings."
    assert sorted(error.value.problems) == [
        f"num_samples: 4 in {folder / 'config.yaml'}, now 9. {advice}",
        f'reference: "previous" in {folder / "config.yaml"}, now "first". {advice}',
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="holds no rounds"):
        run_rounds(config(tmp_path, "dpo", "--folder", str(tmp_path / "mine")), Stages())


def test_a_command_runs_in_a_process_of_its_own() -> None:
    assert run_command(["--version"]) == 0
    assert run_command(["curate", "nonsense"]) == 2


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (
            ["--seed", "1"],
            [
                "method: missing; sft or dpo.",
                "model: missing; name the first policy, a folder or a hub name.",
                "data.path: missing; name a file, a folder or a hub data set.",
                "reward: none given; set one of model, function, url, rules, sources.",
            ],
        ),
        (
            ["sft", "--thresholds", "[2, 1]", "--num-rounds", "1", "--min-margin", "1"],
            [
                "--thresholds: 2 for 1 rounds.",
                "--thresholds: must not decrease from round to round (got [2.0, 1.0]).",
                "--min-margin: not read by rounds sft. Remove it.",
            ],
        ),
        (
            ["dpo", "--num-samples", "1", "--quantiles", "[0.5]"],
            [
                "--num-samples: a pair needs 2 responses (got 1).",
                "--quantiles: not read by rounds dpo. Remove it.",
            ],
        ),
    ],
)
def test_wrong_arguments_get_a_line_each(
    arguments: list[str], complaints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", "m", "--data.path", "p", "--reward.function", "m:f"] if arguments[0] in ("sft", "dpo") else []
    assert main(["rounds", *arguments, *rest]) == 2
    assert capsys.readouterr().err.splitlines() == [f"rlhf: error: {line}" for line in complaints]
