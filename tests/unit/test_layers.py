"""The arrows between packages, and where heavy libraries may be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "rlhf"

LEAVES = {"types", "config", "errors", "importing", "terminal", "reward_log", "stopwatch", "episode", "repair"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "importing": set(),
    "terminal": set(),
    "reward_log": set(),
    "stopwatch": set(),
    "episode": {"types"},
    "repair": set(),
    "config": {"errors"},
    "algorithms": LEAVES,
    "conversations": LEAVES,
    "planning": LEAVES | {"algorithms"},
    "engines": LEAVES | {"algorithms", "conversations"},
    "environments": LEAVES | {"conversations", "engines"},
    "actors": LEAVES | {"algorithms", "engines", "planning", "environments"},
    "orchestrator": LEAVES | {"algorithms", "conversations", "engines"},
    "report": LEAVES | {"orchestrator"},
    "launch": LEAVES
    | {"algorithms", "conversations", "planning", "engines", "environments", "actors", "orchestrator", "report"},
    "cli": LEAVES | {"algorithms", "planning", "engines", "actors", "orchestrator", "report", "launch"},
}
"""Package -> the packages it may import, besides itself."""

ROOMS: dict[str, tuple[set[str], ...]] = {
    "engines": (
        {"base", "process"},
        {"fakes", "models", "rewards"},
        {"weight_sync"},
        {"training", "rollout"},
    ),
    "orchestrator": ({"run"}, {"step"}, {"data", "evaluation"}, {"loop"}),
    "config": ({"base"}, {"algo", "reward"}, {"rules"}, {"loading"}),
}
"""Package -> tiers of its folders and modules, the lowest first. Each imports lower tiers only, besides itself."""

HEAVY: dict[str, set[str]] = {
    "ray": {"actors", "cli"},
    "vllm": {"engines"},
    "deepspeed": {"engines"},
    "transformers": {"engines"},
    "flash_attn": {"engines"},
    "torch": {"engines", "algorithms"},
    "datasets": {"orchestrator"},
}

MAY_SEE: dict[str, set[str]] = {
    "orchestrator": {"rlhf.engines.base"},
    "environments": {
        "rlhf.engines.base",
        "rlhf.engines.process.child_process",
        "rlhf.engines.process.repairs",
        "rlhf.engines.process.user_code",
    },
}
"""Which modules of the engines these packages see: protocols, and for environments how processes run user code."""


def package_of(path: Path) -> str:
    """The first-level package (or leaf module) that a file belongs to."""
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def broken_arrows(package: str, source: str) -> list[str]:
    """Every import in `source`, a file of `package`, that an arrow or a library's place forbids."""
    problems = []
    visible = MAY_SEE.get(package)
    for module in imports(source):
        top, *rest = module.split(".")
        if top in HEAVY and package not in HEAVY[top]:
            problems.append(f"{package} imports {module}")
        if top != "rlhf" or not rest or rest[0] == package:
            continue
        hidden = visible is not None and rest[0] == "engines" and module not in visible
        if rest[0] not in ALLOWED[package] or hidden:
            problems.append(f"{package} imports {module}")
    return problems


def imports(source: str) -> list[str]:
    """Every module that `source` imports, at its top or inside a function."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrow"
            modules.append(node.module or "")
    return modules


def arrows_up(package: str, room: str, source: str) -> list[str]:
    """Every import in `source`, a file of a package's `room`, of a room that stands as high or higher."""
    tier_of = {name: tier for tier, names in enumerate(ROOMS.get(package, ())) for name in names}
    found = []
    for module in imports(source):
        top, *rest = module.split(".")
        if top != "rlhf" or len(rest) < 2 or rest[0] != package or rest[1] == room:
            continue
        if tier_of.get(rest[1], -1) >= tier_of.get(room, len(tier_of)):
            found.append(f"{package}.{room} imports {module}")
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
EVERY_FILE = sorted(
    path for folder in ("rlhf", "tests", "benchmarks") for path in ROOT.parent.joinpath(folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert broken_arrows(package_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_a_package_import_lower_rooms_only(path: Path) -> None:
    if path.parent == ROOT:
        return
    room = path.relative_to(ROOT).parts[1].removesuffix(".py")
    assert arrows_up(package_of(path), room, path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "room", "line"),
    [
        ("engines", "models", "from rlhf.engines.weight_sync.base import Info"),
        ("engines", "training", "from rlhf.engines.rollout.spec import EngineSpec"),
        ("engines", "weight_sync", "def f():\n    from rlhf.engines.rollout.serving import ServingGate"),
        ("orchestrator", "step", "from rlhf.orchestrator.loop import Loop"),
        ("config", "algo", "from rlhf.config.rules.online import check"),
    ],
)
def test_an_arrow_up_is_seen(package: str, room: str, line: str) -> None:
    assert len(arrows_up(package, room, line)) == 1


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("orchestrator", "import ray"),
        ("orchestrator", "from rlhf.actors.groups import WorkerGroup"),
        ("orchestrator", "from rlhf.engines.rollout.vllm_engine import VllmEngine"),
        ("actors", "from rlhf.orchestrator.loop import Loop"),
        ("algorithms", "from rlhf.engines.base import TrainEngine"),
        ("algorithms", "import transformers"),
        ("config", "import torch"),
        ("config", "from rlhf.types import Role"),
        ("engines", "def f():\n    import ray"),
        ("cli", "from vllm import LLM"),
        ("launch", "from rlhf.cli.main import main"),
        ("launch", "import ray"),
        ("environments", "import ray"),
        ("environments", "from rlhf.actors.rollout import RolloutPool"),
        ("engines", "from rlhf.environments.engine import EpisodeEngine"),
        ("environments", "from rlhf.engines.rollout.vllm_engine import VllmEngine"),
    ],
)
def test_a_broken_arrow_is_seen(package: str, line: str) -> None:
    assert len(broken_arrows(package, line)) == 1


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_a_file_is_one_noun(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_fits_on_a_screen(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60} == set()


def test_the_process_of_a_reward_function_imports_no_torch() -> None:
    """It would take seconds at each start, and half a gigabyte."""
    script = "import sys, rlhf.actors.workers, rlhf.engines.rewards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
