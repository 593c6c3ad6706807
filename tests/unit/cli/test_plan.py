"""`rlhf plan` as a user meets it."""

import json
from pathlib import Path

import pytest

from rlhf.actors.cluster import gpus_of
from rlhf.cli.main import main
from rlhf.errors import ConfigError
from rlhf.planning.cluster_shape import sheet_of
from tests.unit.planning.support import LLAMA_3_8B

PLAN = ["plan", "ppo", "--policy.model", "model", "--reward.model", "model"]
MERGED = ["--colocate", "policy,reference", "--colocate", "critic,reward"]


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nothing but a config.json, where commands run on a wide screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path / "model"


def wide(*roles: str, devices: int) -> list[str]:
    return [word for role in roles for word in (f"--{role}.num-gpus-per-node", str(devices))]


FITTING = [*PLAN, *wide("policy", "reference", "critic", "reward", devices=4), "--rollout.num-engines", "8"]


def test_a_plan_is_a_drawing_tables_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FITTING, *MERGED, "--cluster", "2x8xH100"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "ppo on 2x8xH100: 16 of 16 devices in 3 groups",
        "  node 0    A A A A B B B B",
        "  node 1    C C C C C C C C",
        "A = policy+reference",
        "GiB of one device, by phase",
        "A policy+reference peaks in learn: policy activations 26.0, policy optimizer 22.4",
        "  node 0 holds 0.0 GiB in host memory, and 104.7 more while it resumes or exports, of 2048",
        "Seconds of a step",
        "tokens/s; devices idle",
    ):
        assert line in shown, shown


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ([], "2 processes on the driver's node: no CPUs are reserved for them, and as much memory as they take"),
        (
            ["--rollout.environment-workers", "4", "--rollout.environment-memory-gib", "2"],
            "4 workers on any node, each with 2 processes: no CPUs are reserved for them, and up to 2 GiB of memory "
            "for each process",
        ),
    ],
)
def test_processes_of_environments_are_named(flags: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    tools = ["--rollout.tools", "tools:add", "--rollout.environment-processes", "2", *flags]
    assert main([*FITTING, *MERGED, "--cluster", "2x8xH100", *tools]) == 0
    assert f"  tools and environments run in {where}" in capsys.readouterr().out


def test_equal_nodes_share_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FITTING, *MERGED, "--cluster", "8x8xH100"]) == 0
    assert "  nodes 2-7    · · · · · · · ·" in capsys.readouterr().out


def test_what_does_not_fit_ends_with_the_knob_and_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sft", "--policy.model", "model", "--cluster", "8xH100"]) == 2
    shown = capsys.readouterr().out
    assert "! policy does not fit: " in shown
    assert "! It fits with: --policy.num-gpus-per-node 4" in shown


def test_what_finds_no_room_says_where_it_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--cluster", "3xH100"]) == 2
    said = capsys.readouterr().err
    assert "rlhf: error: placement: " in said
    assert "This can be placed: --cluster.colocate policy,reference --cluster.colocate critic,reward" in said


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FITTING, *MERGED, "--cluster", "2x8xH100", "--json", "--suggest"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["cluster"], plan["num_devices"], plan["fits"]) == ("2x8xH100", 16, True)
    assert plan["groups"][0]["bytes"]["learn"] > plan["groups"][0]["bytes"]["score"]
    assert len(plan["suggestions"]) == 3


def test_suggestions_are_flags_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FITTING, *MERGED, "--cluster", "2x8xH100", "--suggest", "true"]) == 0
    shown = capsys.readouterr().out.split("Suggestions\n")[1]
    assert "1. " in shown
    assert "s a step (" in shown
    assert "   --cluster.colocate all" in shown


def test_this_machine_is_the_cluster_at_hand(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {**LLAMA_3_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    (model / "config.json").write_text(json.dumps(tiny | {"num_key_value_heads": 8, "vocab_size": 512}))
    main([*PLAN, "--cluster.device", "cpu"])
    assert "ppo on 1x5xCPU: 5 of 5 devices in 5 groups" in capsys.readouterr().out


def test_no_rows_and_no_weights_are_needed_but_a_size_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert main([*PLAN, "--cluster", "8xH100"]) == 3
    assert "policy.model: config.json has no hidden_size" in capsys.readouterr().err


def test_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", "sft", "--policy.model", "org/model", "--cluster", "8xH100"]) == 3
    assert "policy.model: org/model is not in the hub's cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cluster", "some"], "cluster: need NODESxDEVICESxKIND"),
        (["--prompt-tokens", "0"], "--prompt-tokens: must be > 0 (got 0)."),
        (["--policy.lrr", "1"], "--policy.lrr: unknown key. Did you mean --policy.lr?"),
    ],
)
def test_wrong_options_are_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *flags]) == 2
    assert said in capsys.readouterr().err


def test_help_lists_the_plan_s_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "--help"], ["plan", "grpo", "--help"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "--cluster TEXT" in shown
        assert "--suggest" in shown


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("A10G", "A10G"),
    ],
)
def test_a_driver_s_name_finds_its_sheet(name: str, kind: str) -> None:
    assert sheet_of(name).name == kind


def test_a_device_without_a_sheet_is_refused() -> None:
    with pytest.raises(ConfigError, match='no data sheet of "Radeon"'):
        sheet_of("Radeon")


def test_ray_says_which_gpus_a_node_has() -> None:
    assert gpus_of({"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}) == ["H100", "H100"]
    assert gpus_of({"CPU": 8.0}) == []
