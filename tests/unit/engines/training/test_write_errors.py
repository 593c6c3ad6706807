"""A shard that a full disk cuts off says so, with its path and the room that it needs, whatever its writer says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.engines.training.write_errors import WriteErrors, tensor_bytes

STATE = {"module": {"a": torch.zeros(2**20), "b": [torch.zeros(3, dtype=torch.bfloat16)]}, "step": 3}
WRITE = """
mount -t tmpfs -o size=2m tmpfs {folder} && exec {python} - <<'END'
from pathlib import Path
import torch
from safetensors.torch import save_file
from rlhf.engines.training.write_errors import WriteErrors, tensor_bytes
state = {{"w": torch.zeros(2**20)}}
for name, save in (("a.pt", torch.save), ("b.safetensors", save_file)):
    errors, path = WriteErrors(), Path("{folder}") / name
    with errors.collected(path, tensor_bytes(state)):
        save(state, path)
    print(errors.first)
    path.unlink(missing_ok=True)
END
"""


@pytest.mark.timeout(180)
def test_a_full_disk_is_named_whichever_library_writes(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    script = WRITE.format(folder=tmp_path, python=sys.executable)
    result = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("disk")]
    assert [line.partition(" needs")[0] for line in lines] == [
        f"disk full (No space left on device): {tmp_path}/{name}" for name in ("a.pt", "b.safetensors")
    ]
    assert all("needs about 4.19 MB, " in line and line.endswith(" MB are free") for line in lines)


def test_other_errors_keep_their_text(tmp_path: Path) -> None:
    errors = WriteErrors()
    with errors.collected(tmp_path / "a"):
        raise PermissionError(13, "Permission denied")
    with errors.collected(tmp_path / "none" / "b"):
        save_file({"w": torch.zeros(1)}, tmp_path / "none" / "b")
    assert errors.first == "Permission denied"
    with pytest.raises(RuntimeError, match="shape"), errors.collected(tmp_path / "a"):
        raise RuntimeError("shape mismatch")


def test_bytes_of_nested_tensors_are_summed() -> None:
    assert tensor_bytes(STATE) == 4 * 2**20 + 6
