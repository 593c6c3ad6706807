"""`rlhf sample` on real models: killed and continued, scored by a function and by a reward model, then curated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli.main import main
from rlhf.config.data import DataSection
from rlhf.engines.models.tokenizer import load_tokenizer
from tests.tiny_models import make_policy, make_reward_model
from tests.unit.orchestrator.data.data_support import load_preferences

DATA = os.environ.get("RLHF_TEST_DATA")
TIMEOUT_S = 180
REWARD = '''\
import time
from pathlib import Path

slow = Path("slow")


def vowels(prompts, responses, level, labels):
    """The share of vowels, and what stands in the rows. Takes its time while the file `slow` is there."""
    if slow.exists():
        time.sleep(0.4)
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) + n for text, n in zip(responses, level, strict=True)]
'''


@pytest.fixture
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the commands run."""
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_policy(folder / "policy")
    make_reward_model(folder / "scorer")
    (folder / "taste.py").write_text(REWARD)
    rows = [
        {"prompt": [{"role": "user", "content": f"Tell me more about {n}"}], "level": n % 2, "label": n}
        if n % 2
        else {"prompt": f"Once upon {n}", "level": n % 2, "label": n}
        for n in range(12)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(model: str, out: str, *more: str) -> list[str]:
    lengths = ["--max-tokens", "16", "--max-prompt-tokens", "64", "--chunk-size", "2", "--num-samples", "3"]
    given = ["sample", model, "--out", out, "--data.path", "prompts.jsonl", "--engine", "transformers"]
    return [*given, *lengths, *more]


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_command_goes_on_to_the_same_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = ("--reward.function", "taste:vowels")
    assert main(arguments("policy", "whole.jsonl", *scored)) == 0
    assert "step 6/6" in capsys.readouterr().out
    rows = rows_of(folder / "whole.jsonl")
    assert len(rows) == 36
    assert len({str(row["response"]) for row in rows[:3]}) == 3
    assert {type(row["prompt"]) for row in rows} == {str, list}
    assert [row["label"] for row in rows] == [str(n // 3) for n in range(36)]

    (folder / "slow").touch()
    command = [sys.executable, "-m", "rlhf.cli.main", *arguments("policy", "torn.jsonl", *scored)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    torn = folder / "torn.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (torn.exists() and torn.read_bytes().count(b"\n") >= 6) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(TIMEOUT_S)
    (folder / "slow").unlink()
    assert 6 <= torn.read_bytes().count(b"\n") < 36
    with torn.open("ab") as file:
        file.write(b'{"id": "prompts.js')  # a write that the kill tore

    assert main(arguments("policy", "torn.jsonl", *scored, "--temperature", "0.5")) == 2
    assert "torn.jsonl was made with temperature 1.0, now 0.5" in capsys.readouterr().err
    assert main(arguments("policy", "torn.jsonl", *scored)) == 0
    assert "step 1/6" not in capsys.readouterr().out
    assert torn.read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert main(arguments("policy", "torn.jsonl", *scored)) == 0
    assert capsys.readouterr().out == "torn.jsonl: all 36 responses are there already.\n"


def test_a_reward_model_scores_in_the_same_process_and_its_pairs_can_be_trained_on(folder: Path) -> None:
    assert main(arguments("policy", "scored.jsonl", "--reward.model", "scorer")) == 0
    rows = rows_of(folder / "scored.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "scorer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "scorer")
    for row in [row for row in rows if isinstance(row["prompt"], str) and row["finish_reason"] == "length"][:4]:
        ids = tokenizer(f"<s>{row['prompt']}{row['response']}", add_special_tokens=False, return_tensors="pt")
        if len(ids.input_ids[0]) != 1 + len(str(row["prompt"])) + 16:
            continue  # it sampled a token that text does not show
        with torch.no_grad():
            assert row["reward"] == pytest.approx(float(model(**ids).logits[0, 0]), abs=1e-4)
    assert len({row["reward"] for row in rows}) > 30

    assert main(["curate", "pairs", "scored.jsonl", "--out", "pairs.jsonl", "--keep-truncated"]) == 0
    section = DataSection(path=str(folder / "pairs.jsonl"), allow_control_tokens=True)
    split = load_preferences(section, load_tokenizer(str(folder / "policy")))
    assert len(split.train) + sum(split.dropped.values()) == len(rows_of(folder / "pairs.jsonl"))
    assert 8 <= len(split.train) <= 12


@pytest.mark.parametrize(
    ("more", "code", "complaint"),
    [
        (
            ("--max-tokens", "600"),
            2,
            "--max-tokens: 64 + 600 tokens > context 512 of policy. Lower --max-tokens to 448.",
        ),
        (("--data.path", "nothing.jsonl"), 3, "data: nothing.jsonl matches no file."),
        (("--reward.function", "taste:sour"), 2, "sour"),
        (("--reward.model", "policy"), 3, "reward.model:"),
    ],
)
def test_bad_input_is_found_before_the_engine_starts(
    folder: Path, more: tuple[str, ...], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("policy", "never.jsonl", *more)) == code
    assert complaint in capsys.readouterr().err
    assert not (folder / "never.jsonl").exists() or not (folder / "never.jsonl").read_bytes()


@pytest.mark.skipif(DATA is None, reason="RLHF_TEST_DATA is not set")
def test_stories_are_sampled_scored_and_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lengths.py").write_text("def words(prompts, responses): return [len(set(r.split())) for r in responses]\n")
    Path("prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "One day, Lily"}\n')
    model = str(Path(DATA or ".") / "models" / "stories260k")
    assert main(arguments(model, "s.jsonl", "--reward.function", "lengths:words", "--num-samples", "8")) == 0
    assert main(["curate", "raft", "s.jsonl", "--out", "d.jsonl", "--keep-truncated"]) == 0
    rewards = np.array([row["reward"] for row in rows_of(Path("s.jsonl"))]).reshape(2, 8)
    assert [row["reward"] for row in rows_of(Path("d.jsonl"))] == rewards.max(axis=1).tolist()
