"""What is tried on GPUs, in its dry mode on a CPU: the parts themselves work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_day.parts import PARTS

ROOT = Path(__file__).parents[2]
IN_EVERY_CHANGE = ("checksum", "log-probs")
"""The others take three minutes: they run where RLHF_TEST_GPU_DAY is set, every night."""


@pytest.mark.parametrize("part", PARTS)
def test_a_part_passes_its_dry_run(part: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if part not in IN_EVERY_CHANGE and not os.environ.get("RLHF_TEST_GPU_DAY"):
        pytest.skip("set RLHF_TEST_GPU_DAY=1 for the parts that take long")
    folder = tmp_path_factory.getbasetemp() / "gpu_day"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--dry", "--folder", str(folder), "--parts", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / f"{part}.log").read_text()
    assert "passed" in done.stdout
