"""The dry run of a large model finds what a rank must not do: here with small matrices."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


def test_a_dry_run_with_small_matrices_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.seventy", "--small", "--layers", "4", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for phase in ("placement", "start: policy, then reference", "export", "save", "resume"):
        assert phase in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_slow_is_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.seventy", "--small", "--layers", "4", "--parts", "load"]
    done = subprocess.run(
        [*command, "--gb-s", "1e-7", "--folder", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "! start: policy, then reference: " in done.stdout
