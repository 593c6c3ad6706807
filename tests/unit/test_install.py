"""What an installation brings: the command line and the config alone, training by extras, exact versions by locks."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import TypeAdapter

from rlhf.importing import TRAINING_LIBRARIES, missing_extra
from tests.unit.report.support import make_run

ROOT = Path(__file__).parents[2]
TABLE = TypeAdapter(dict[str, object])
PROJECT = TABLE.validate_python(
    TABLE.validate_python(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))["project"]
)
LINES = TypeAdapter(list[str])
EXTRAS = TypeAdapter(dict[str, list[str]]).validate_python(PROJECT["optional-dependencies"])
REQUIRED_BY_OTHERS = {"huggingface_hub", "pyarrow", "sympy", "tqdm"}
"""Imported by this package, and installed because a library of the extra requires them."""
UNBOUNDED = {"qlora", "wandb", "mlflow", "dev"}
"""Extras of tools whose next major version breaks no training run."""
LOCKS = {"cpu": ("cpu", "qlora", "dev"), "gpu": ("gpu", "qlora"), "docs": ("docs",)}
"""Lock -> the extras that it pins, beside what a plain install brings."""

WITHOUT_TRAINING = f"""\
import sys
for library in {sorted(TRAINING_LIBRARIES)}:
    sys.modules[library] = None
from rlhf.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def requirements(extra: str | None = None) -> list[Requirement]:
    """What pyproject.toml asks for: by itself, or in an extra and in the extras that this one names."""
    found: list[Requirement] = []
    for wanted in map(Requirement, LINES.validate_python(PROJECT["dependencies"]) if extra is None else EXTRAS[extra]):
        is_own_extra = wanted.name == "rlhf"
        found += [inner for name in wanted.extras for inner in requirements(name)] if is_own_extra else [wanted]
    return found


def pins(lock: str) -> dict[str, str]:
    """Package -> version, of every line of a lock."""
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", text, flags=re.MULTILINE))


def run_without_training(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WITHOUT_TRAINING, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_import_loads_nothing_heavy() -> None:
    """The import has 0.3 s; `make wheel` measures it where nothing else is installed."""
    script = "import sys, rlhf; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not TRAINING_LIBRARIES & set(done.stdout.split())


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("train", "ppo", "--help"), ("sample", "--help"), ("doctor",)]
)
def test_a_command_that_trains_nothing_needs_no_training_library(arguments: tuple[str, ...]) -> None:
    done = run_without_training(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_report_needs_no_training_library(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [{"eval/loss": 2.0}, {"eval/loss": 1.0}])
    for arguments, line in ((("report", str(folder)), "report: "), (("compare", str(folder), str(folder)), "No diff")):
        done = run_without_training(*arguments)
        assert done.returncode == 0, done.stderr
        assert line in done.stdout


def test_a_config_is_checked_without_a_training_library() -> None:
    done = run_without_training("check", "ppo", "configs/ppo.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "policy.model: no such folder" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("quickstart",), ("example", "stories"), ("generate", "some/model", "--prompt", "Once"), ("bench", "sync")],
)
def test_a_command_that_needs_more_says_what_to_install(arguments: tuple[str, ...]) -> None:
    done = run_without_training(*arguments)
    assert done.returncode == 2
    assert "is not installed" in done.stderr
    assert "pip install 'rlhf[cpu]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_only_a_training_library_is_an_extra_s() -> None:
    assert missing_extra(ModuleNotFoundError("no", name="torch.distributed")) is not None
    assert missing_extra(ModuleNotFoundError("no", name="rewards_of_mine")) is None
    assert missing_extra(ImportError("cannot import name", name="torch")) is None


def test_the_training_libraries_are_those_of_the_extra() -> None:
    named = {wanted.name.replace("-", "_") for wanted in requirements("train")}
    assert named | REQUIRED_BY_OTHERS | {"vllm"} == TRAINING_LIBRARIES
    assert not TRAINING_LIBRARIES & {wanted.name.replace("-", "_") for wanted in requirements()}


def test_library_requirements_are_ranges_with_an_end() -> None:
    for extra in set(EXTRAS) - UNBOUNDED:
        for wanted in requirements(extra):
            operators = {specifier.operator for specifier in wanted.specifier}
            assert operators == {">=", "<"}, f"{extra}: {wanted}"


def test_flash_attn_has_a_lock_of_its_own() -> None:
    """Its build imports the torch that gpu.lock installs, so it cannot be installed from the same file."""
    flash, wheel = requirements("flash")
    assert flash.specifier.contains(pins("flash-attn").pop("flash-attn"))
    assert wheel.specifier.contains(pins("gpu")["wheel"])
    assert "flash-attn" not in pins("gpu")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_every_requirement(lock: str) -> None:
    """Torch is not in cpu.lock: its CPU build is installed by scripts/setup.sh."""
    pinned = pins(lock)
    wanted = [item for extra in (None, *LOCKS[lock]) for item in requirements(extra)]
    for requirement in (item for item in wanted if (lock, item.name) != ("cpu", "torch")):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{lock}.lock lacks {requirement.name}. Run `make lock`."
        assert requirement.specifier.contains(version), f"{lock}.lock has {version}, need {requirement}."


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "rlhf" / "py.typed").is_file()
