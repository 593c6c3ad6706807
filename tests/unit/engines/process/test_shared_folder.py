"""What a node says about the folder of a run."""

from pathlib import Path

import pytest

from rlhf.engines.process.shared_folder import folder_problem


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    assert folder_problem(tmp_path, "marker", 1) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["marker"]


@pytest.mark.parametrize("folder", ["there", "nowhere"])
def test_a_folder_that_is_not_shared(tmp_path: Path, folder: str) -> None:
    (tmp_path / "there").mkdir()
    assert folder_problem(tmp_path / folder, "marker", 1).startswith("it does not see what the driver writes there")


def test_a_folder_without_room(tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    assert folder_problem(tmp_path, "marker", 10**18).endswith(" MB are free there, 1e+12 MB or more are needed")


def test_a_folder_that_nobody_can_write() -> None:
    """Not even root, as whom these tests may run."""
    assert folder_problem(Path("/proc/self"), "status", 1).startswith("it cannot write there (")
