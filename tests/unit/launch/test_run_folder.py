"""A run's folder is looked at before anything starts: by `rlhf check`, and by `rlhf train`."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.loading.load import load_config
from rlhf.launch.run_folder import least_checkpoint_bytes
from tests.unit.config.test_model_files import safetensors

DISK = """
mount -t tmpfs -o size={size} tmpfs {folder} && {more} exec {python} -m rlhf.cli.main {verb} sft --run.dir {folder} \
--policy.model org/model --data.path {rows}
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' * 64)
    return path


def on_a_disk(tmp_path: Path, rows: Path, *, size: str, more: str = "", verb: str = "check") -> tuple[int, str]:
    """Exit code and last line of a command whose run.dir is a small file system of its own."""
    (folder := tmp_path / "disk").mkdir()
    script = DISK.format(size=size, folder=folder, more=more, python=sys.executable, verb=verb, rows=rows)
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    result = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, check=False)
    return result.returncode, (result.stdout + result.stderr).splitlines()[-1]


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_disk_without_room_is_refused(tmp_path: Path, rows: Path, verb: str) -> None:
    code, line = on_a_disk(tmp_path, rows, size="1m", verb=verb)
    assert code == 5
    assert line.startswith(f"rlhf: error: run.dir: {tmp_path}/disk has 1.0")
    assert line.endswith("of this run need 16.8 MB or more. Make room, or name another folder")


def test_a_disk_that_is_read_only_is_refused(tmp_path: Path, rows: Path) -> None:
    code, line = on_a_disk(tmp_path, rows, size="64m", more=f"mount -o remount,ro {tmp_path}/disk &&")
    assert code == 5
    assert line == f"rlhf: error: run.dir: {tmp_path}/disk: cannot be written (Read-only file system)"


def test_resuming_nothing_is_refused_and_leaves_nothing(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sft", "--policy.model", "org/model", "--data.path", str(rows)]
    for verb in ("check", "train"):
        assert main([verb, *arguments, "--resume"]) == 2
        assert "no run to resume. Leave out --resume to start it, or set it to auto." in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["check", *arguments, "--resume", "auto"]) == 0
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/run/checkpoints/step_4").mkdir(parents=True)
    (tmp_path / "runs/run/lock").touch()
    assert main(["check", *arguments]) == 2
    assert "holds a run already. Continue it with --resume, or choose another run.name." in capsys.readouterr().err
    assert main(["check", *arguments, "--resume", "auto"]) == 0


def test_the_room_for_a_checkpoint_is_that_of_the_trained_models(tmp_path: Path) -> None:
    for name in ("policy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(safetensors({"w": (64, 64)}))
    size = (tmp_path / "policy/model.safetensors").stat().st_size
    flags = ["--policy.model", str(tmp_path / "policy"), "--reference.model", str(tmp_path / "other")]
    config = load_config("dpo", [*flags, "--data.path", "d"], {})
    assert least_checkpoint_bytes(config, {}) == 3 * size
    adapters = load_config("dpo", [*flags, "--data.path", "d", "--policy.lora.rank", "4"], {})
    assert least_checkpoint_bytes(adapters, {}) == 0
