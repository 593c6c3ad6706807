"""A plan that is calibrated by a run says what that run measured."""

import json
from pathlib import Path

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.cli.main import main
from rlhf.config.loading.load import dump_config, load_config
from rlhf.errors import DataError
from rlhf.planning.calibration import Calibration, calibrated, measured
from rlhf.planning.hardware import GIB, parse_cluster
from rlhf.planning.plan import PHASES
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import sections
from tests.unit.planning.support import LLAMA_3_8B, RUN, shape_of

STEP = {
    "time/generate": 10.0,
    "time/score": 0.5,
    "time/log_probs": 2.0,
    "time/learn": 6.0,
    "time/sync": 0.25,
    "time/step": 20.0,
    "throughput/tokens_per_s": 512 * 300 / 20.0,
    "response/length": 200.0,
    "memory/policy": 60.0,
    "memory/rollout": 70.0,
}
STEPS = [{"time/step": 500.0, "memory/policy": 1.0}] * 2 + [
    STEP,
    {**STEP, "time/learn": 8.0},
    {**STEP, "time/learn": 6.0},
]
GRPO = ["--reward.rules", "math", "--policy.num-gpus-per-node", "8", "--rollout.max-prompt-tokens", "512"]


def test_medians_of_the_steps_that_count() -> None:
    found = measured(STEPS, PHASES, 512)
    assert found.seconds == {"generate": 10.0, "score": 0.5, "log_probs": 2.0, "learn": 6.0, "sync": 0.25}
    assert found.step_s == 20.0
    assert found.memory == {"policy": 60 * GIB, "rollout": 70 * GIB}
    assert (found.lengths.prompt, found.lengths.response) == (pytest.approx(100.0), 200.0)


def test_a_run_of_two_steps_says_nothing() -> None:
    with pytest.raises(DataError, match="the run has 2 steps, need more than 2"):
        measured(STEPS[:2], PHASES, 512)


def test_a_run_that_learned_from_nothing_calibrates_nothing() -> None:
    steps = [{"throughput/tokens_per_s": 0.0, "time/step": 1.0, "response/length": 4.0}] * 4
    with pytest.raises(DataError, match="learned from nothing"):
        measured(steps, PHASES, 8)


def test_a_calibrated_plan_says_what_was_measured() -> None:
    config = load_config("grpo", [*GRPO, *RUN], {})
    needs = build_algorithm(config.algo).needs
    shapes = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_8B))
    found, cluster = measured(STEPS, PHASES, 512), parse_cluster("2x8xH100")
    plan = plan_run(config, needs, shapes, cluster, lengths=found.lengths)
    calibration = calibrated(found, plan)
    again = plan_run(config, needs, shapes, cluster, lengths=found.lengths, calibration=calibration)
    assert again.seconds["learn"] == pytest.approx(6.0)
    assert again.seconds["generate"] == pytest.approx(10.0)
    assert again.processes == {
        "policy": pytest.approx(60 * GIB),
        "rollout": pytest.approx(70 * GIB),
    }
    assert again.step_s == pytest.approx(20.0)
    assert calibration.other_s == pytest.approx(20.0 - 18.25)  # with the rule's score, which no plan counts


def test_what_costs_the_same_on_every_device_is_not_scaled() -> None:
    config = load_config("grpo", [*GRPO, *RUN], {})
    needs = build_algorithm(config.algo).needs
    shapes, cluster = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_8B)), parse_cluster("2x8xH100")
    plan = plan_run(config, needs, shapes, cluster)
    assert 0 < plan.fixed_seconds["generate"] < plan.seconds["generate"]
    fixed, total = plan.fixed_seconds["learn"], plan.seconds["learn"]

    def learning(measured_s: float) -> tuple[float, Calibration]:
        """What a plan says once learning took so long."""
        steps = [{**step, "time/learn": measured_s} for step in STEPS]
        calibration = calibrated(measured(steps, PHASES, 512), plan)
        again = plan_run(config, needs, shapes, cluster, calibration=calibration)
        return again.seconds["learn"], calibration

    again, calibration = learning(fixed + (total - fixed) / 2)
    assert again == pytest.approx(fixed + (total - fixed) / 2)
    assert calibration.seconds["learn"] == pytest.approx(0.5)
    assert "learn" not in calibration.fixed_seconds
    again, calibration = learning(fixed / 2)
    assert again == pytest.approx(fixed / 2)
    assert calibration.fixed_seconds["learn"] == calibration.seconds["learn"] == pytest.approx(fixed / 2 / total)


def test_libraries_are_as_large_in_every_plan() -> None:
    config = load_config("grpo", [*GRPO, *RUN], {})
    needs = build_algorithm(config.algo).needs
    shapes = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_8B))
    cluster, twice = parse_cluster("2x8xH100"), Calibration(memory_factors={"models": 2.0, "rollout": 1.5})
    plan = plan_run(config, needs, shapes, cluster)
    more = plan_run(config, needs, shapes, cluster, calibration=twice)
    sizes = {"rollout": 2.3 * GIB}  # with its CUDA graphs
    assert plan.libraries == {name: pytest.approx(sizes.get(name, 1.3 * GIB)) for name in plan.libraries}
    assert plan.libraries == more.libraries
    for name, size in plan.processes.items():
        factor = twice.memory_factors["rollout" if name == "rollout" else "models"]
        libraries = plan.libraries[name]
        assert more.processes[name] - libraries == pytest.approx(factor * (size - libraries))


def test_vllm_holds_half_as_much_again_as_the_weights_on_a_cpu() -> None:
    held = {}
    for engine in ("vllm", "transformers"):
        config = load_config("grpo", [*GRPO, *RUN, "--rollout.engine", engine], {})
        needs = build_algorithm(config.algo).needs
        shapes = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_8B))
        held[engine] = plan_run(config, needs, shapes, parse_cluster("2x8xCPU")).processes["rollout"]
    weights = 4 * shape_of(LLAMA_3_8B).num_parameters
    assert held["vllm"] - held["transformers"] == pytest.approx(0.5 * weights + 0.2 * GIB)


def test_a_calibration_is_kept_and_read(tmp_path: Path) -> None:
    calibration = Calibration(seconds={"learn": 1.5}, other_s=0.5, memory_factors={"models": 2.0})
    calibration.write(tmp_path / "c.json")
    assert Calibration.read(tmp_path / "c.json") == calibration
    for text in ("{", '{"unknown": 1}', '{"memory": {"models": 1e9}}'):  # the last held bytes once
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(DataError, match=r"c.json: not a calibration"):
            Calibration.read(tmp_path / "c.json")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a finished run leaves behind, as far as a calibration reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_3_8B))
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    config = load_config("grpo", [*GRPO, *RUN, "--policy.model", "model"], {})
    (folder / "config.yaml").write_text(dump_config(config))
    torn = '{"time/step": 5'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS) + torn)
    return folder


def test_the_command_compares_and_keeps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--calibrate", "runs/run", "--cluster", "2x8xH100"]) == 0
    shown = capsys.readouterr().out
    assert "learn, s" in shown
    assert "policy, GiB" in shown
    assert (run / "calibration.json").is_file()
    again = ["plan", "grpo", str(run / "config.yaml"), "--cluster", "2x8xH100", "--calibration", "runs/run", "--json"]
    means = ["--prompt-tokens", "100", "--response-tokens", "200"]
    assert main([*again, *means]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"]["learn"] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        ("config.yaml", 2, "is not a run's folder: no config.yaml there"),
        ("metrics.jsonl", 3, "metrics.jsonl: "),
    ],
)
def test_what_is_missing_is_named(
    run: Path, spoil: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / spoil).unlink()
    assert main(["plan", "--calibrate", "runs/run", "--cluster", "2x8xH100"]) == code
    assert said in capsys.readouterr().err
