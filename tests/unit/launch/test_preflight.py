"""`rlhf check` finds what `rlhf train` would find before it starts Ray, in the same words."""

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from rlhf.cli import main as cli
from rlhf.config.loading.load import load_config
from rlhf.launch import train
from rlhf.launch.full_check import checked_config
from rlhf.launch.preflight import MAX_ROWS, preflight
from rlhf.orchestrator.data.load import evenly_spaced
from rlhf.orchestrator.run.checkpoint import FORMAT, MANIFEST, STATE, sha256_of

pytestmark = pytest.mark.timeout(120)

REWARDS = """
def joy(prompts, responses): return [float(len(text)) for text in responses]
def needs_answer(responses, ground_truth_answer): return [0.0 for _ in responses]
def breaks(prompts, responses): raise KeyError("colour")
def one_number(prompts, responses): return [1.0]
"""


@pytest.fixture
def world(short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a run needs. No Ray is started from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "model").symlink_to(short_model)
    write_rows(tmp_path / "rows.jsonl", 64)
    (tmp_path / "preflight_rewards.py").write_text(REWARDS)

    def starts(*_: object) -> None:
        raise AssertionError("Ray is started for a run that cannot work")

    monkeypatch.setattr(train, "open_cluster", starts)
    return tmp_path


def write_rows(file: Path, number: int, prompt: str = "row {} of the data set") -> None:
    file.write_text("".join(json.dumps({"prompt": prompt.format(n), "answer": str(n)}) + "\n" for n in range(number)))


def add_row(world: Path, row: dict[str, object]) -> None:
    with (world / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")


RUN = ["--policy.model", "model", "--data.path", "rows.jsonl", "--reward.function", "preflight_rewards:joy"]
LENGTHS = ["--rollout.max-prompt-tokens", "32", "--rollout.max-response-tokens", "32", "--rollout.batch-size", "8"]
GOOD = [*RUN, *LENGTHS]


def hold_a_run(world: Path) -> None:
    """A run with a checkpoint, saved by the same config."""
    config = load_config("grpo", GOOD, {})
    state = {
        "step": 5,
        "seed": config.run.seed,
        "ranks": {"policy": 1},
        "config": config.model_dump(mode="json"),
        "data_fingerprint": "another data set",
    }
    checkpoint = world / "runs" / "run" / "checkpoints" / "step_5"
    checkpoint.mkdir(parents=True)
    (world / "runs" / "run" / "lock").touch()
    file = checkpoint / STATE
    file.write_text(json.dumps(state))
    files = {STATE: {"size": file.stat().st_size, "sha256": sha256_of(file)}}
    (checkpoint / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": 5, "files": files}))


def one_gpu(world: Path) -> None:
    """A machine with one GPU."""
    program = world / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho NVIDIA H100\n")
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"


def broken_tokenizer(world: Path) -> None:
    (world / "broken").mkdir()
    for file in (world / "model").iterdir():
        (world / "broken" / file.name).write_bytes(file.read_bytes())
    (world / "broken" / "tokenizer.json").write_text("{")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


PORT = free_port()
JUDGE = f"[{{type: judge, url: 'http://127.0.0.1:{PORT}/v1/chat/completions', model: m}}]"
BEFORE: dict[str, Callable[[Path], None]] = {
    "holds a run": hold_a_run,
    "resume: changed": hold_a_run,
    "data: the files changed": hold_a_run,
    "This machine has 1": one_gpu,
    "tokenizer": broken_tokenizer,
    "1 of 65 prompts exceed": lambda world: add_row(world, {"prompt": "row " * 60}),
    "cannot be divided": lambda world: write_rows(world / "rows.jsonl", 64, "the same"),
    "prompt is not text": lambda world: add_row(world, {"prompt": 1}),
}
CANNOT_WORK: list[tuple[list[str], int, str]] = [
    ([*GOOD, "--policy.lrr", "1"], 2, "--policy.lrr: unknown key. Did you mean --policy.lr?"),
    ([*GOOD, "--policy.model", "./missing"], 3, "no such folder: ./missing"),
    ([*GOOD, "--policy.model", "broken"], 3, "tokenizer"),
    ([*GOOD, "--rollout.max-prompt-tokens", "64"], 2, "tokens > context 64 of model"),
    (GOOD, 2, "holds a run already. Continue it with --resume"),
    ([*GOOD, "--resume"], 2, "no run to resume"),
    ([*GOOD, "--resume", "--policy.lr", "0.5"], 2, "resume: changed since step_5: policy.lr"),
    ([*GOOD, "--resume"], 2, "data: the files changed since step_5"),
    (GOOD, 3, "1 of 65 prompts exceed 32 tokens (first: rows.jsonl:65)"),
    (GOOD, 3, "rows.jsonl:65: prompt is not text (got int)"),
    ([*GOOD, "--data.path", "missing.jsonl"], 3, "missing.jsonl matches no file"),
    ([*GOOD, "--rollout.batch-size", "72"], 3, "64 rows < rollout.batch_size 72"),
    ([*GOOD, "--data.eval-fraction", "0.1"], 3, "data.eval_fraction: one prompt cannot be divided"),
    ([*GOOD, "--reward.function", "preflight_rewards:missing"], 2, "missing"),
    ([*GOOD, "--reward.function", "preflight_rewards:needs_answer"], 2, "ground_truth_answer"),
    ([*GOOD, "--reward.function", "preflight_rewards:breaks"], 4, "KeyError"),
    ([*GOOD, "--reward.function", "preflight_rewards:one_number"], 4, "1"),
    ([*RUN[:4], *LENGTHS, "--reward.sources", JUDGE], 2, f"reward.sources.0.url: nothing answers at 127.0.0.1:{PORT}"),
    ([*GOOD, "--policy.num-nodes", "2"], 2, "policy.num_nodes: 2 nodes, and there is 1. This run has this machine"),
    ([*GOOD, "--cluster.device", "cuda"], 2, "cluster.device: cuda, but this machine has no GPU that can be used."),
    ([*GOOD, "--policy.num-gpus-per-node", "4"], 2, "This machine has 1 (NVIDIA H100)."),
]


@pytest.mark.parametrize(("argv", "code", "said"), CANNOT_WORK, ids=[str(n) for n in range(len(CANNOT_WORK))])
def test_check_and_train_say_the_same_of_a_run_that_cannot_work(
    argv: list[str],
    code: int,
    said: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored at the end
    for start, prepare in BEFORE.items():
        if start in said:
            prepare(world)
    lines = []
    for verb in ("check", "train"):
        assert cli.main([verb, "grpo", *argv]) == code
        lines.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf: error")])
    assert lines[0] == lines[1]
    assert said in "\n".join(lines[0])


def test_a_policy_that_would_never_learn(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many steps the epochs have, only the rows say."""
    for verb in ("check", "train"):
        assert cli.main([verb, "ppo", *GOOD, "--algo.critic-warmup-steps", "8"]) == 2
        assert "rlhf: error: algo.critic_warmup_steps: 8 of 8 steps (1 epoch over 64 rows)" in capsys.readouterr().err


def test_a_folder_that_another_driver_holds(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock of another process; one's own would be given again."""
    folder = world / "runs" / "run"
    (folder / "checkpoints" / "step_2").mkdir(parents=True)  # what is in use cannot be resumed either
    (folder / "lock").touch()
    code = "import fcntl, sys; f = open('lock', 'rb+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        for verb in ("check", "train"):
            assert cli.main([verb, "grpo", *GOOD]) == 2
            assert f"{folder}: in use by another driver. Stop it first" in capsys.readouterr().err
        holder.communicate("\n")


def test_a_good_run_says_what_was_checked_and_what_was_not(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "grpo", *GOOD]) == 0
    out = capsys.readouterr().out
    assert "Checked: settings; run folder; models; 2 processes on the CPU; 64 rows with the tokenizer.\n" in out
    assert out.endswith("Not checked: memory (`rlhf plan`).\nNo mistake was found.\n")
    assert not (world / "runs").exists(), "a check leaves nothing behind"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz"])
def test_small_compressed_files_are_read(world: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"row {n} of the data set", "answer": str(n)} for n in range(64)]
    if name.endswith(".gz"):
        (world / name).write_bytes(gzip.compress((world / "rows.jsonl").read_bytes()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), world / name)
    good = ["check", "grpo", *GOOD, "--data.path", name]
    assert cli.main(good) == 0
    assert "64 rows with the tokenizer.\n" in capsys.readouterr().out
    assert cli.main([*good, "--data.prompt-key", "question"]) == 3
    assert 'data.prompt_key: no column "question" (have prompt, answer)' in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:--data.path. given twice")
def test_rows_that_are_not_read_are_said_with_the_reason(world: Path) -> None:
    def unread(path: str) -> str:
        config, _ = checked_config("grpo", [*GOOD, "--data.path", path], {})
        return next(line for line in preflight(config, {}).not_looked_at if line.startswith("rows: "))

    assert unread("row") == "rows: no file or folder row here, so the run downloads that data set from the hub"
    noise = random.Random(0).randbytes(3 * 2**20)
    rows = "".join(json.dumps({"prompt": noise[n : n + 8].hex()}) + "\n" for n in range(0, len(noise), 8))
    (world / "large.jsonl.gz").write_bytes(gzip.compress(rows.encode(), compresslevel=1))
    assert unread("large.jsonl.gz").startswith("rows: only files up to 16 MiB (2 MiB of .parquet and .gz) are read;")


def test_a_note_about_the_rows_is_said_once(
    world: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Loading the rows logs notes that a check shows too."""
    (world / "set").mkdir()
    for split in ("train", "test"):
        write_rows(world / "set" / f"{split}.jsonl", 64)
    rows = world / "set" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"answer"', '"nobody": 1, "answer"'))
    assert cli.main(["check", "grpo", *GOOD, "--data.path", "set"]) == 0
    said = [*capsys.readouterr().out.splitlines(), *caplog.messages]
    assert sum("the split train is read" in line for line in said) == 1
    assert sum("columns that nothing read" in line for line in said) == 1


def test_of_many_rows_some_are_tokenized(world: Path) -> None:
    write_rows(world / "rows.jsonl", MAX_ROWS + 10)
    config, _ = checked_config("grpo", GOOD, {})
    found = preflight(config, {})
    assert f"{MAX_ROWS} rows, evenly spaced, with the tokenizer" in found.looked_at
    assert "the length of the other rows" in found.not_looked_at
    assert evenly_spaced([0, 1, 2, 3, 4, 5], 3) == [0, 2, 4]
    assert evenly_spaced([0, 1], 3) == [0, 1]


def test_rows_that_are_left_out_are_counted_among_those_that_were_looked_at(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        add_row(world, {"prompt": "row " * 60})
    config, _ = checked_config("grpo", [*GOOD, "--data.overlong", "drop"], {})
    preflight(config, {})
    assert caplog.messages == ["3 of 67 rows of rows.jsonl: not used, over the token limit"]


def test_what_is_not_on_this_machine_is_not_looked_at(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(world))
    config, _ = checked_config("grpo", [*GOOD, "--policy.model", "org/model"], {})
    found = preflight(config, {"HF_HOME": str(world)})
    assert "models and the length of rows: org/model will be downloaded" in found.not_looked_at
    config, _ = checked_config("grpo", GOOD, {})
    elsewhere = preflight(config, {"RAY_ADDRESS": "head:6379"})
    assert "the cluster's devices, and what its nodes can reach" in elsewhere.not_looked_at
