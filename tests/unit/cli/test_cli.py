"""The `rlhf` command: what it prints, what it exits with, and what it does not import."""

# ruff: noqa: E501

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import __version__
from rlhf.cli import main as cli
from rlhf.cli.help import main_help
from rlhf.cli.pages.configuration import reference
from rlhf.cli.train_help import train_help
from rlhf.config.commands import COMMANDS, METHODS
from rlhf.config.fields import fields_of, list_items
from rlhf.config.tools import GenerateConfig
from rlhf.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NumericsError,
    PreemptedError,
    RewardError,
    StallError,
    WeightSyncError,
    WorkerLostError,
)
from rlhf.launch import full_check
from rlhf.launch.full_check import checked_config
from tests.unit.config.test_model_files import safetensors

ROOT = Path(__file__).parents[3]
HEAVY = ["torch", "ray", "transformers", "vllm", "deepspeed", "datasets", "rich"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small files of a model and a scorer, rows and a reward function, on a machine without the
    libraries that would load them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(full_check, "can_load", lambda: False)
    for name, kind in (("model", "LlamaForCausalLM"), ("scorer", "LlamaForSequenceClassification")):
        folder = tmp_path / name
        folder.mkdir()
        config = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 1024, "architectures": [kind]}
        (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}}))
        (folder / "model.safetensors").write_bytes(safetensors({"model.embed_tokens.weight": (8, 4)}))
        (folder / "tokenizer.json").write_text("{}")
    rows = [{"prompt": f"q{n}", "response": "a", "chosen": "good", "rejected": "bad"} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text("def score(prompts, responses, **columns): return [0.0] * len(prompts)\n")
    return tmp_path


PPO = ["--data.path", "rows.jsonl", "--policy.model", "model", "--reward.function", "rewards:score"]


def call(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from rlhf.cli.main import main; code = main()\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--version"], __version__),
        (["--help"], "rlhf train"),
        (["train", "ppo", "--help"], "--policy.lr NUMBER"),
        (["generate", "--help"], "--max-tokens INTEGER"),
        (["check", "ppo", *PPO[:2], "--policy.model", "org/model", *PPO[4:]], "No mistake was found."),
    ],
)
def test_nothing_heavy_is_imported(world: Path, argv: list[str], said: str) -> None:
    done = call(*argv)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stderr.strip() == "heavy: []"


def test_a_mistake_is_lines_on_stderr_and_exit_code_2(world: Path) -> None:
    done = call("train", "ppo", "--policy.lrr", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    *lines, heavy = done.stderr.splitlines()
    assert lines[0] == "rlhf: error: --policy.lrr: unknown key. Did you mean --policy.lr?"
    assert all(line.startswith("rlhf: error: ") for line in lines)
    assert heavy == "heavy: []"


@pytest.mark.parametrize("words", ["train ppo --help", "data prompts --data.path rows.jsonl"])
def test_a_closed_pipe_is_quiet(words: str, tmp_path: Path) -> None:
    """As in `rlhf ... | head -1`, once the reader is gone; also for tables, which rich writes."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?"}\n')
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", *words.split()],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=env,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in {0, 141}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["tran"],
            'rlhf: error: unknown command "tran" (have train, check, plan, generate, sample, curate, rounds, data, reward, bench, report, compare, example, doctor, chaos, quickstart, completion). Did you mean train?',
        ),
        (["train", "pppo"], 'rlhf: error: train: unknown method "pppo" (have {have}). Did you mean ppo?'),
        (["train", "dappo"], 'rlhf: error: train: unknown method "dappo" (have {have}). Did you mean dapo?'),
        (["check", "zzz"], 'rlhf: error: check: unknown method "zzz" (have {have}).'),
    ],
)
def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == line.format(have=", ".join(COMMANDS)) + "\n"


def test_twenty_problems_are_shown_and_the_rest_counted(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [word for n in range(25) for word in (f"--policy.wrong{n}", "1")]
    assert cli.main(["check", "sft", *wrong, "--data.path", "x", "--policy.model", "org/m"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "rlhf: error: and 5 more."


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "rlhf: interrupted.\n"),
        (RewardError("no response"), 4, "rlhf: error: no response\n"),
        (CheckpointError("no room"), 5, "rlhf: error: no room\n"),
        (NumericsError("loss is nan\nat step 3"), 6, "rlhf: error: loss is nan at step 3\n"),
        (WorkerLostError("a died"), 7, "rlhf: error: a died\n"),
        (StallError("a waits"), 8, "rlhf: error: a waits\n"),
        (WeightSyncError("b waits"), 8, "rlhf: error: b waits\n"),
        (PreemptedError("saved step 4; continue with --resume"), 75, "rlhf: saved step 4; continue with --resume\n"),
        (ModelError(["a: x", "b: y"]), 3, "rlhf: error: a: x\nrlhf: error: b: y\n"),
        (SystemExit(9), 9, ""),
    ],
)
def test_each_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fails(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fails)
    assert cli.main([]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "sft", "--policy.model", "9" * 400, "--data.path", "rows.jsonl"],
        ["check", "sft", "--policy.model", "model", "--data.path", "9" * 400],
        ["doctor", "9" * 400],
    ],
)
def test_a_name_that_no_file_can_have_is_a_line(
    world: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == f"rlhf: error: no such file: {'9' * 60}... (longer than a file's name may be).\n"


def test_an_unexpected_error_leaves_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(_: list[str]) -> int:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(cli, "run", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main([]) == 70
    line = capsys.readouterr().err
    assert line.startswith("rlhf: error: internal: ZeroDivisionError: oh. Traceback: ")
    assert "in fails" in Path(line.rpartition("Traceback: ")[2].strip()).read_text()
    assert cli.main(["--debug"]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_right_run_passes_its_check(world: Path) -> None:
    config, advice = checked_config("ppo", [*PPO, "--rollout.top-p", "0.9", "--algo.correction.type", "none"], {})
    assert config.models["critic"].model == "model"
    assert advice == [
        "--rollout.top-p: 0.9 samples from a part of the vocabulary, but the ratio is taken over all of it."
    ]
    checked_config("sft", PPO[:4], {})
    checked_config("rm", [*PPO[:2], "--reward.model", "model"], {})
    checked_config("ppo", [*PPO[:4], "--reward.model", "scorer"], {})


def test_fewer_rows_than_a_batch_are_told(world: Path) -> None:
    with pytest.raises(DataError) as error:
        checked_config("sft", [*PPO[:4], "--train.batch-size", "65"], {})
    assert error.value.problems == ("data: 64 rows < train.batch_size 65. Lower train.batch_size or add rows.",)


@pytest.mark.parametrize(
    ("argv", "error", "line"),
    [
        (["--policy.model", "./nowhere"], ModelError, "--policy.model: no such folder: ./nowhere."),
        (["--data.path", "no/*.jsonl"], DataError, "data: no/*.jsonl matches no file."),
        (["--reference.model", "small"], ModelError, "--reference.model: vocab differs from policy (4 vs 8); KL is undefined."),
        (["--reward.function", "rewards:nope"], ConfigError, "--reward.function: {folder}/rewards.py defines no nope."),
        (
            ["--rollout.max-response-tokens", "800"],
            ConfigError,
            "--rollout.max-response-tokens: 512 + 800 tokens > context 1024 of model. "
            "Lower rollout.max_response_tokens to 512.",
        ),
        (["--critic.model", "small"], ModelError, "--critic.model: vocab differs from policy (4 vs "),
        (
            ["--reference.model", "stranger"],
            ModelError,
            "--reference.model: as many tokens as the policy, but 2 of 3 differ; KL is undefined.",
        ),
        (
            ["--data.template", "chat"],
            ModelError,
            "--data.template: chat, but the tokenizer of model has no chat template. Use plain.",
        ),
        (["--log.wandb-project", "p"], ConfigError, "--log.wandb-project: environment variable WANDB_API_KEY is not set. Export it, or set WANDB_MODE=offline."),
        (["--data.path", "empty.jsonl"], DataError, "data: empty.jsonl has no rows."),
        (["--data.path", "bad.jsonl"], DataError, "bad.jsonl:2: "),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:--data.path. given twice")
def test_what_does_not_fit_this_machine_is_found(
    world: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], error: type[ConfigError], line: str
) -> None:
    monkeypatch.setenv("HOME", str(world))
    (world / "empty.jsonl").write_text("\n")
    (world / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    small = world / "small"
    small.mkdir()
    (small / "config.json").write_text('{"model_type": "llama", "vocab_size": 4}')
    (small / "model.safetensors").write_bytes(safetensors({"a": (1,)}))
    shutil.copytree(world / "model", world / "stranger")
    for name, text in (("model", "abc"), ("stranger", "bac")):
        tokens = {"model": {"vocab": {letter: i for i, letter in enumerate(text)}}}
        (world / name / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(error) as raised:
        checked_config("ppo", [*PPO, *argv], {})
    assert type(raised.value) is error
    assert any(found.startswith(line.format(folder=world)) for found in raised.value.problems), raised.value.problems


def test_a_hub_data_set_is_left_to_the_run(world: Path) -> None:
    before = set(sys.modules)
    checked_config("ppo", ["--data.path", "org/name", *PPO[2:]], {})
    assert "datasets" not in set(sys.modules) - before


@pytest.mark.filterwarnings("ignore:--data.path. given twice")
def test_problems_of_several_classes_come_together(world: Path) -> None:
    argv = [*PPO, "--policy.model", "./no", "--data.path", "no.jsonl", "--policy.lr", "-1"]
    with pytest.raises(ConfigError) as raised:
        checked_config("ppo", argv, {})
    assert type(raised.value) is ConfigError
    assert len(raised.value.problems) == 3


def test_a_reward_model_needs_a_score_head(world: Path) -> None:
    with pytest.raises(ModelError, match="has no score head, need a head with 1"):
        checked_config("ppo", [*PPO[:4], "--reward.model", "model"], {})


def test_a_reward_model_has_one_label(world: Path) -> None:
    config = json.loads((world / "scorer" / "config.json").read_text())
    (world / "scorer" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(ModelError, match=r"^--reward\.model: has 2 labels, need a head with 1\. Train one with"):
        checked_config("ppo", [*PPO[:4], "--reward.model", "scorer"], {})


def test_plain_http_to_a_public_host_is_found_before_anything_starts(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name too; a name that nobody knows here may be known where the reward's process runs."""

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host == "nobody.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(2, 1, 6, "", ("93.184.215.14" if host == "public.example" else "10.0.0.7", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for host in ("nobody.example", "private.example"):
        checked_config("ppo", [*PPO[:4], "--reward.url", f"http://{host}/score"], {})
    with pytest.raises(ConfigError) as error:
        checked_config("ppo", [*PPO[:4], "--reward.url", "http://public.example/score"], {})
    assert error.value.problems == (
        "--reward.url: plain http to a non-private host; use https, or allow_plain_http of the source.",
    )


def test_the_secret_of_a_service_is_a_variable_that_is_set(world: Path) -> None:
    sources = "[{type: http, url: 'https://a', auth_env: RM_TOKEN}]"
    checked_config("ppo", [*PPO[:4], "--reward.sources", sources], {"RM_TOKEN": "x"})
    with pytest.raises(ConfigError, match=r"--reward\.sources\.0\.auth-env: names an environment variable"):
        checked_config("ppo", [*PPO[:4], "--reward.sources", sources], {})


@pytest.mark.parametrize("command", list(METHODS))
def test_help_lists_every_setting(command: str) -> None:
    text = train_help("train", command, ["--help", "all"])
    for field in fields_of(METHODS[command].config):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in METHODS])
def test_help_of_a_member_has_its_own_settings(name: str) -> None:
    command = COMMANDS[name]
    text = train_help("train", name, ["--help", "all"])
    assert f"A member of {command.method}: --{command.key} {name}." in " ".join(text.split())
    assert "only with type" not in text.partition("algo: ")[2].partition("[default")[0]


def test_help_of_a_member_has_its_own_defaults() -> None:
    assert "[default sequence-mean]" in train_help("train", "gspo", ["--help", "all"])
    assert "--algo.loss.gamma NUMBER" in train_help("train", "simpo", ["--help", "all"])
    assert "--algo.loss.gamma" not in train_help("train", "ipo", ["--help", "all"])


@pytest.mark.parametrize("config", [*(method.config for method in METHODS.values()), GenerateConfig])
def test_every_setting_is_documented(config: type[GenerateConfig]) -> None:
    fields = list(fields_of(config))
    fields += [field for known in fields for item in list_items(known) for field in fields_of(item)]
    for field in fields:
        assert field.meaning, field.name
        assert field.meaning.endswith("."), field.name


def test_the_commands_named_in_the_help_exist() -> None:
    text = " ".join(main_help().split())
    assert "{" + ",".join(METHODS) + "}" in text
    assert all(name in text for name in COMMANDS)


def test_the_reference_is_current() -> None:
    """Run `python -m rlhf.cli.pages.configuration docs/configuration.md` after changing a setting."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()
