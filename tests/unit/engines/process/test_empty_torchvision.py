"""torchvision can be imported where it is not installed, and is the installed one where it is."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

START = """
from rlhf.engines.process.empty_torchvision import provide_torchvision
provide_torchvision()
provide_torchvision()
"""
EMPTY = """
import sys
import torchvision.transforms.v2.functional as first
from torchvision.transforms.v2 import functional as second
from torchvision.transforms import InterpolationMode
def resize(image, mode: InterpolationMode | first.Mode | None = InterpolationMode.BICUBIC): ...
assert second.InterpolationMode.BICUBIC
assert not hasattr(InterpolationMode, "__wrapped__")
from transformers.utils.import_utils import is_torchvision_available
assert not is_torchvision_available()
assert sum(type(finder).__name__ == "_EmptyPackage" for finder in sys.meta_path) == 1
import transformers.models.gemma3.image_processing_gemma3
try:
    second.resize([1])
except ImportError as error:
    assert str(error) == "torchvision is not installed: images need its resize.", error
else:
    raise AssertionError("an image was resized without torchvision")
try:
    import torchvision_of_another_name
except ModuleNotFoundError:
    sys.exit(0)
sys.exit(1)
"""
INSTALLED = """
import torchvision
assert torchvision.VALUE == 3
try:
    import torchvision.transforms
except ModuleNotFoundError:
    raise SystemExit(0)
raise SystemExit(1)
"""


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_image_processors_are_imported_and_say_what_is_missing() -> None:
    assert run(EMPTY) == ""


def test_an_installed_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("VALUE = 3\n")
    assert run(INSTALLED, tmp_path) == ""


def run(code: str, *folders: Path) -> str:
    """What a fresh process that runs `code` says on stderr before it fails; nothing if it does not."""
    path = os.pathsep.join(map(str, (*folders, *sys.path)))
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode else ""
