"""The GPUs of this machine. Imports no torch."""

import os
import shutil
import subprocess

TIMEOUT_S = 30.0


def local_gpus() -> list[str]:
    """Names of this machine's GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def usable_gpus() -> list[str]:
    """Names of the GPUs that CUDA_VISIBLE_DEVICES leaves to this process."""
    gpus, visible = local_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else gpus[: len([device for device in visible.split(",") if device.strip()])]
