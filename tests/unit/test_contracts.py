"""What our code needs of the installed libraries is there; and what a library lacks is named."""

import zipfile
from pathlib import Path

import pytest

from tests.contracts import LIBRARIES, Sources, Use, broken, our_uses, report, uses_in
from tests.reached import REACHED

PACKAGE = {
    "vllm/__init__.py": "import typing\nMODULE_ATTRS = {'LLM': '.entrypoints.llm:LLM'}\nfrom .config import *\n",
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/llm.py": "class LLM:\n    def __init__(self, model, **more): ...\n",
    "vllm/config/__init__.py": "try:\n    from .base import Base as Root\nexcept ImportError:\n    pass\n",
    "vllm/config/base.py": "from vllm._C import digest\nclass Base:\n    seed: int\n"
    "class Args(Base):\n    model: str = ''\n    def run(self):\n        self.engine = 1\n"
    "def load(path, *, strict=True): ...\n",
    "vllm/envs.py": "VLLM_KNOWN: bool = True\n",
    "vllm/ops.py": "def __getattr__(name):\n    if name == 'made':\n        return 1\n    raise AttributeError(name)\n",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-9.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in PACKAGE.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_installed_library_has_all_that_we_use(library: str) -> None:
    sources = Sources.installed(library)
    if sources is None:
        pytest.skip(f"{library} is not installed")
    assert broken(sources, our_uses(), REACHED) == []


def test_our_uses_are_found() -> None:
    uses = {(use.module, use.name) for use in our_uses()}
    expected = {("vllm", "EngineArgs"), ("ray", "get"), ("deepspeed", "initialize"), ("transformers", "AutoConfig")}
    assert expected | {("vllm.envs", "VLLM_USE_V2_MODEL_RUNNER")} <= uses
    assert any(use.name == "EngineArgs" and "tensor_parallel_size" in use.keywords for use in our_uses())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("from vllm import LLM\nLLM(1, seed=2)", None),
        ("from vllm import Root\nRoot(seed=1)", None),
        ("from vllm.config.base import Args\nArgs(seed=1, model='')", None),
        ("from vllm.config.base import digest", None),
        ("from vllm.config import base", None),
        ("import os\nos.environ['VLLM_KNOWN'] = '1'", None),
        ("import vllm.config\nvllm.config.Root", None),
        ("import vllm\nvllm.config.base.Args.run", None),
        ("import vllm\nvllm.config.base.Args.stop", "a.py:2: vllm.config.base.Args has no stop"),
        ("vllm = load()\nvllm.config.base.load(speed=1)", "a.py:2: vllm.config.base.load takes no speed"),
        ("from vllm.ops import made", None),
        ("from vllm.ops import unmade", "a.py:1: vllm.ops has no unmade"),
        ("from vllm import AsyncLLM", "a.py:1: vllm has no AsyncLLM"),
        ("from vllm.config.gone import Args", "a.py:1: vllm.config.gone has no Args"),
        ("\nfrom vllm.config.base import Args\nArgs(sed=1)", "a.py:3: vllm.config.base.Args takes no sed"),
        ("from vllm.config.base import load\nload('a', lax=1)", "a.py:2: vllm.config.base.load takes no lax"),
        ("import vllm as v\nv.load()", "a.py:2: vllm has no load"),
        ("import os\nos.environ['VLLM_GONE'] = '1'", "a.py:2: vllm.envs has no VLLM_GONE"),
    ],
)
def test_what_a_wheel_lacks_is_named(wheel: Path, line: str, problem: str | None) -> None:
    found = broken(Sources.of_wheel(wheel), list(uses_in(line, "a.py")), {})
    assert found == ([] if problem is None else [problem])


def test_attributes_of_a_class_and_of_its_bases_are_known(wheel: Path) -> None:
    sources = Sources.of_wheel(wheel)
    reached = {"vllm.config.base:Args": ["seed", "engine", "run", "stop"], "vllm.config.base:Other": ["seed"]}
    assert broken(sources, [], reached) == [
        "vllm.config.base has no Other",
        "vllm.config.base.Args has no stop",
    ]


def test_a_report_says_what_is_broken(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = Sources.of_wheel(wheel)
    assert report(sources, [Use("vllm", "Gone", frozenset(), "a.py:1")])
    assert "vllm 9.9.0" in (out := capsys.readouterr().out)
    assert "  a.py:1: vllm has no Gone" in out
