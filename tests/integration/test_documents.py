"""The commands that README, docs and configs show are real: each is run, with `check` in place of `train`."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from rlhf.cli.main import main
from rlhf.config.loading.load import load_config
from rlhf.config.loading.load_about_runs import load_chaos
from rlhf.config.loading.load_tools import (
    load_bench,
    load_compare,
    load_curate,
    load_report,
    load_reward_try,
    load_rounds,
    load_sample,
)
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PLACEHOLDERS = re.compile(r"\[|\{|\.\.\.|MODEL|CONFIG|\bRUN\b")
"""A line that shows a form, not a command."""


def commands_of(page: Path) -> list[str]:
    """`rlhf` command lines in a page's code blocks, or in a config's comments."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
    else:
        lines = [line for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    stripped = [" ".join(line.split("  #")[0].split()) for line in whole]
    after_submit = [line.split(" -- ", 1)[1] if line.startswith("ray job submit") else line for line in stripped]
    return [line for line in after_submit if line.startswith("rlhf ") and not PLACEHOLDERS.search(line)]


LOADERS: dict[str, Callable[[list[str]], object]] = {
    "sample": lambda words: load_sample(words, {}),
    "curate": lambda words: load_curate(words, {}),
    "rounds": lambda words: load_rounds(words, {}),
    "reward": lambda words: load_reward_try(words, {}),
    "bench": lambda words: load_bench(words, {}),
    "chaos": lambda words: load_chaos(words[0], words[1:], {}),
    "report": lambda words: load_report(words, {}),
    "compare": lambda words: load_compare(words, {}),
}
"""Commands that would run for long, or read the folders of runs: their arguments are read."""
LARGEST_BATCH = 512
"""Rows that a step of one of them reads."""
COMMANDS = sorted({command for page in [*PAGES, *CONFIGS] for command in commands_of(page)})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(ROOT / "configs", folder / "configs")
    rows = {
        "demonstrations": '{"prompt": "a", "response": "b"}\n',
        "preferences": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        "prompts": '{"prompt": "a"}\n',
        "problems": '{"question": "a", "answer": "2 + 3 = 5\\n#### 5"}\n',
        "labeled": "".join(f'{{"prompt": "a", "completion": "{n}", "label": {n}}}\n' for n in ("true", "false")),
        "steps": '{"prompt": "a", "completions": ["b", "c"], "labels": [true, false]}\n',
    }
    for name, row in rows.items():
        # Different prompts: held-out rows have others than those that are trained on.
        text = "".join(row.replace('"a"', f'"a {n}"') for n in range(LARGEST_BATCH))
        (folder / f"{name}.jsonl").write_text(text)
        (folder / f"my_{name}.jsonl").write_text(text)
    for name, function in (("rewards", "score"), ("my_rewards", "compute_score")):
        code = f"def {function}(prompts, responses): return [len(text) for text in responses]\n"
        (folder / f"{name}.py").write_text(code)
    (folder / "runs" / "stories").mkdir(parents=True)
    for made, like in (("pairs", "preferences"), ("labeled", "labeled")):
        shutil.copy(folder / f"{like}.jsonl", folder / "runs" / "stories" / f"{made}.jsonl")
    for model in ("my_model", "runs/sft/model", "runs/rm/model", "runs/ppo/model", "runs/stories/sft/model"):
        train_tokenizer(["a b c"], 300, folder / model)
        make_llama(folder / model, vocab_size=300, hidden_size=128, num_layers=1, context=4096)
    as_scorer(folder / "runs/rm/model")
    return folder


def as_scorer(model: Path) -> None:
    """Put a score head on a model, as `rlhf train rm` leaves one."""
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    scorer.save_pretrained(model)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_accepted(
    command: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    if words[0] in LOADERS:
        monkeypatch.chdir(workspace)
        LOADERS[words[0]](words[1:])
        return
    if "org/" in command:  # of models that only a hub has, the flags are read
        load_config(words[1], words[2:], {})
        return
    if words[0] == "train" and "--help" not in words:
        words[0] = "check"
    if words[0] == "check" and "--help" not in words and "--run.dir" not in words:
        # The folders of earlier runs, whose models the configs name, hold no run here; nor is there one to resume.
        words = [word for word in words if word != "--resume"] + ["--run.dir", "new"]
    if words[0] in ("generate", "quickstart", "example"):
        words.append("--help")
    if words[0] == "check":  # as if in an empty runs/, and whatever the length of a row in this model's tokens
        words = [word for word in words if word not in ("--resume", "--checkpoint.resume")]
        words += ["--run.dir", str(tmp_path), "--data.overlong", "drop"]
    monkeypatch.chdir(workspace)
    code = main(words)
    assert code == 0, f"{command}\n{capsys.readouterr()}"


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert set(target) - {""} <= targets, page
