"""Shell completion of commands, methods, flags and values."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf.cli import main as cli
from rlhf.cli.completion import VERBS, completion
from rlhf.config.commands import COMMANDS
from rlhf.errors import ConfigError


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "rlhf.bash"
    file.write_text(completion("bash"))
    return file


def complete(script: Path, line: str) -> list[str]:
    """What bash offers at the end of a line."""
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = (
        f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _rlhf; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=30, check=True, env={"PATH": "/bin"}
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlhf tr", ["train"]),
        ("rlhf train gr", ["grpo"]),
        ("rlhf check online-", ["online-dpo", "online-kto"]),
        ("rlhf train grpo --policy.lora.", ["--policy.lora.rank", "--policy.lora.alpha", "--policy.lora.targets"]),
        ("rlhf train dapo --algo.clip-h", ["--algo.clip-high"]),
        ("rlhf train rm run.yaml --reward.lr", ["--reward.lr", "--reward.lr-schedule"]),
        ("rlhf train sft --rollout.", []),
        ("rlhf train grpo --reward.rules c", ["choice", "code"]),
        ("rlhf plan grpo --clust", ["--cluster.address", "--cluster.device", "--cluster.colocate"]),
        ("rlhf generate --max-t", ["--max-tokens"]),
        ("rlhf train grpo --data.path /", []),
        ("rlhf completion f", ["fish"]),
    ],
)
def test_bash_completes(script: Path, line: str, offered: list[str]) -> None:
    found = complete(script, line)
    if line.startswith("rlhf plan"):
        assert set(offered) < set(found)
        assert "--cluster" in found
    elif "rules" in line:
        assert set(found) <= {"choice", "code"}
    else:
        assert found == offered


def test_values_of_a_flag_are_offered(script: Path) -> None:
    assert {"dr-grpo", "dapo"} <= set(complete(script, "rlhf train grpo --algo d"))
    assert complete(script, "rlhf train grpo --rollout.engine v") == ["vllm"]


def test_every_command_is_known() -> None:
    assert set(VERBS) == set(cli.VERBS)


def test_fish_and_zsh_know_the_same() -> None:
    fish, zsh = completion("fish"), completion("zsh")
    assert zsh.startswith("#compdef rlhf\n")
    assert "complete -o default -F _rlhf rlhf" in zsh
    assert all(f" {name} " in fish or f" {name}'" in fish for name in COMMANDS)
    assert "-l algo.clip-high -r -d 'The ratio is clipped above at 1 + clip_high'" in fish
    assert "-l rollout.engine -xa 'auto vllm transformers'" in fish


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / shell
    file.write_text(completion(shell))
    subprocess.run([shell, "-n", str(file)], timeout=30, check=True)


def test_another_shell_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of bash, zsh, fish"):
        completion("tcsh")
    assert cli.main(["completion"]) == 2
