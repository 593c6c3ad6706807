"""Groups of processes that compute each micro-batch together."""

from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from tests.tiny_models import make_policy

RUN = ("--policy.model", "m", "--data.path", "d.jsonl")


@pytest.mark.parametrize(
    ("size", "nodes", "gpus", "problem"),
    [
        ("2", "1", "2", None),
        ("4", "2", "2", None),
        ("2", "1", "1", "1 processes do not split into groups of 2. Use one of 1, or more processes."),
        ("3", "2", "2", "4 processes do not split into groups of 3. Use one of 1, 2, 4, or more processes."),
    ],
)
def test_groups_divide_the_processes(size: str, nodes: str, gpus: str, problem: str | None) -> None:
    flags = ("--policy.sequence-parallel-size", size, "--policy.num-nodes", nodes, "--policy.num-gpus-per-node", gpus)
    if problem is None:
        assert load_config("sft", [*RUN, *flags], {}).models["policy"].sequence_parallel_size == int(size)
        return
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config("sft", [*RUN, *flags], {})
    assert any("policy.sequence-parallel-size" in line for line in caught.value.problems)


def test_an_attention_that_cannot_be_shared_is_refused() -> None:
    flags = ("--policy.sequence-parallel-size", "2", "--policy.num-gpus-per-node", "2", "--policy.attention", "eager")
    with pytest.raises(ConfigError, match="eager does not compute packed sequences on several processes"):
        load_config("sft", [*RUN, *flags], {})


def test_a_check_names_the_flag_where_heads_do_not_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_policy(tmp_path / "model")
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 64)
    flags = ("--policy.sequence-parallel-size", "4", "--policy.num-gpus-per-node", "4")
    code = main(["check", "sft", "--policy.model", "model", "--data.path", "rows.jsonl", *flags])
    assert code == 2
    lines = capsys.readouterr().err
    assert "--policy.sequence-parallel-size" in lines
    assert "2 attention heads of model do not split over 4 processes. Use one of 1, 2." in lines
