"""Problems that do not follow from each other are named together, by a check and by a run."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from rlhf.cli import main as cli
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from rlhf.errors import ConfigError, DataError, ModelError, RewardError
from rlhf.launch import train
from rlhf.launch.findings import Findings
from tests.unit.launch.test_preflight import hold_a_run

pytestmark = pytest.mark.timeout(120)

CODE = """
def joy(responses): return [float(len(text)) for text in responses]
def needs_price(responses, price): return [0.0 for _ in responses]
def breaks(responses): raise KeyError("colour")
def add(a: int, b: int) -> int:
    return a + b
"""
CONTEXT = "tokens > context 64 of model"
ROWS = ["--data.path", "rows.jsonl"]
MODEL = ["--policy.model", "model"]
SHORT = ["--rollout.max-prompt-tokens", "32", "--rollout.max-response-tokens", "32", "--rollout.batch-size", "8"]
GRPO = ["grpo", *MODEL, *ROWS]
TWO = (
    "[{type: function, name: a, function: 'told_together:breaks'}, "
    "{type: function, name: b, function: 'told_together:needs_price'}]"
)
JOY = ["--reward.function", "told_together:joy"]


@pytest.fixture
def world(short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a context of 64 tokens, and 64 rows of which one has more. No Ray is started from it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "model").symlink_to(short_model)
    texts = [f"row {n} of the data set" for n in range(63)] + ["row " * 60]
    rows = [{"prompt": text, "response": " yes", "answer": "1"} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "told_together.py").write_text(CODE)

    def starts(*_: object) -> None:
        raise AssertionError("Ray is started for a run that cannot work")

    monkeypatch.setattr(train, "open_cluster", starts)
    return tmp_path


def add_bad_row(world: Path) -> None:
    with (world / "rows.jsonl").open("a") as rows:
        rows.write('{"prompt": 1, "answer": "1"}\n')


OVERLONG = "1 of 64 prompts exceed 32 tokens (first: rows.jsonl:64). Use data.overlong=drop."
TOGETHER: dict[str, tuple[list[str], list[str]]] = {
    "the context, and rows over what fits into it": (
        [*GRPO, *JOY],
        ["Lower rollout.max_prompt_tokens to 32 and rollout.max_response_tokens to 32, for example.", OVERLONG],
    ),
    "the same offline": (
        ["sft", *MODEL, *ROWS, "--train.batch-size", "8"],
        [
            f"1024 {CONTEXT}. Lower data.max_tokens to 64.",
            "data: 1 of 64 rows exceed 64 tokens (data.max_tokens) (first: rows.jsonl:64). Use data.overlong=drop.",
        ],
    ),
    "a misspelled flag, the context, rows, the reward function": (
        [*GRPO, "--reward.function", "told_together:breaks", "--policy.lrr", "1"],
        ["--policy.lrr: unknown key.", CONTEXT, OVERLONG, "KeyError"],
    ),
    "rows and a reward function that needs a column they lack": (
        [*GRPO, *SHORT, "--reward.function", "told_together:needs_price"],
        [OVERLONG, "price"],
    ),
    "two reward functions": (
        [*GRPO, *SHORT, "--data.overlong", "drop", "--reward.sources", TWO],
        ["KeyError", "price"],
    ),
    "a wrong row and one over the limit": (
        [*GRPO, *SHORT, *JOY],
        ["rows.jsonl:65: prompt is not text (got int).", OVERLONG],
    ),
    "the device and rows": (
        [*GRPO, *SHORT, *JOY, "--cluster.device", "cuda"],
        ["cluster.device: cuda, but this machine has no GPU", OVERLONG],
    ),
    "a critic that is not there, and rows": (
        ["ppo", *MODEL, *ROWS, *SHORT, *JOY, "--train.batch-size", "8", "--critic.model", "./missing"],
        ["--critic.model: no such folder: ./missing.", OVERLONG],
    ),
    "changed settings and rows": (
        [*GRPO, *SHORT, *JOY, "--resume", "--policy.lr", "0.5"],
        [OVERLONG, "resume: changed since step_5: policy.lr"],
    ),
    "what is dropped leaves too few": (
        [*GRPO, *SHORT, *JOY, "--data.overlong", "drop", "--rollout.batch-size", "64"],
        ["data: 63 rows < rollout.batch_size 64."],
    ),
}
NO_ROWS = ["none.jsonl" if word == "rows.jsonl" else word for word in GRPO]
BEFORE: dict[str, Callable[[Path], None]] = {
    "a wrong row and one over the limit": add_bad_row,
    "changed settings and rows": hold_a_run,
}


@pytest.mark.parametrize("case", TOGETHER)
def test_independent_problems_are_named_together(case: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, said = TOGETHER[case]
    if case in BEFORE:
        BEFORE[case](world)
    told = []
    for verb in ("check", "train"):
        assert cli.main([verb, *argv]) in (2, 3)
        told.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf: error")])
    assert told[0] == told[1]
    assert len(told[0]) == len(said), told[0]
    for words, line in zip(said, told[0], strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*GRPO, *SHORT, *JOY, "--data.overlong", "drop", "--policy.model", "./no"], "--policy.model: no such folder"),
        ([*GRPO, *SHORT, "--data.overlong", "drop", "--reward.function", "told_together:no"], "defines no no"),
        ([*GRPO, *SHORT, *JOY, "--data.overlng", "drop"], "--data.overlng: unknown key"),
        ([*GRPO, *JOY, "--rollout.max-prompt-tokens", "x", "--rollout.max-response-tokens", "32"], "whole number"),
        ([*NO_ROWS, *SHORT, *JOY], "data: none.jsonl matches no file."),
        ([*GRPO, *SHORT, "--data.overlong", "drop"], "reward"),
    ],
)
def test_one_mistake_is_one_line(argv: list[str], said: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *argv]) in (2, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_shortest_context_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths that fit into the policy's would be too long for the critic's."""
    train_tokenizer([f"row {n} of the data set" for n in range(100)], 300, tmp_path / "short")
    make_llama(tmp_path / "short", vocab_size=300, hidden_size=32, num_layers=1, context=48)
    argv = [*MODEL, *ROWS, *JOY, "--critic.model", "short", "--data.overlong", "drop", "--rollout.batch-size", "8"]
    assert cli.main(["check", "ppo", *argv, "--train.batch-size", "8"]) == 2
    assert "tokens > context 48 of short. Lower rollout.max_prompt_tokens to 24" in capsys.readouterr().err


def test_what_was_found_is_raised_as_what_it_is() -> None:
    def fail(error: Exception) -> None:
        raise error

    for errors, kind in (
        ([DataError("a"), DataError("b")], DataError),
        ([DataError("a"), ModelError("b")], ConfigError),
        ([RewardError("a")], RewardError),
        ([RewardError("a"), DataError("b")], ConfigError),
        ([RewardError("a"), RewardError("b")], ConfigError),
    ):
        found = Findings()
        for error in errors:
            found.attempt(partial(fail, error))
        with pytest.raises(kind) as raised:
            found.settle()
        assert type(raised.value) is kind
        assert str(raised.value).splitlines() == ["a", "b"][: len(errors)]


def test_a_line_is_kept_once_whatever_place_it_names() -> None:
    found = Findings()
    found.add(["grpo.yaml:3: rollout.engine: not here."])
    found.add(["rollout.engine: not here.", "policy.model: not here either."])
    assert found.blames("policy.model")
    assert not found.blames("rollout.engine")
    with pytest.raises(ConfigError) as raised:
        found.settle()
    assert raised.value.problems == ("grpo.yaml:3: rollout.engine: not here.", "policy.model: not here either.")
