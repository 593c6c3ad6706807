"""Settings that a model's architecture does not have, or computes wrong, are refused by name before anything starts."""

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main
from tests.families import tiny_family
from tests.tiny_models import make_family, make_policy, tiny_tokenizer

SFT = ("--policy.model", "model", "--data.path", "rows.jsonl", "--data.max-tokens", "64", "--data.template", "plain")
ONE_STEP = ("--train.batch-size", "8", "--train.num-steps", "1")
LORA = ("--policy.lora.rank", "4", "--policy.gradient-checkpointing", "--policy.lora.targets")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"q{n}", "response": f"a{n}"}) for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def checked(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["check", "sft", *SFT, *ONE_STEP, *argv])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "argv", "said"),
    [
        ("dense", ("--policy.freeze-router",), "policy.freeze_router: a LlamaForCausalLM has no routers"),
        ("dense", ("--policy.float32-router",), "policy.float32_router: a LlamaForCausalLM has no routers"),
        ("dense", ("--algo.router-aux-coef", "0.01"), "policy.model: algo.router_aux_coef needs a mixture of experts"),
        ("deepseek_v3", ("--algo.router-aux-coef", "0.01"), "transformers has none for a DeepseekV3ForCausalLM"),
        (
            "qwen3_moe",
            (*LORA, "gate_up_proj"),
            "no linear layers called gate_up_proj; have k_proj, o_proj, q_proj, v_proj, experts.down_proj, "
            "experts.gate_up_proj.",
        ),
        ("qwen3_moe", (*LORA, "q_proj", LORA[-1], "experts.gate_up_proj"), ""),
        ("dense", (*LORA, "experts.down_proj"), "no linear layers called experts.down_proj; have "),
        ("qwen3_moe", ("--policy.freeze-router", "--policy.float32-router", "--policy.float32-head"), ""),
        ("qwen3_moe", ("--algo.router-aux-coef", "0.01"), ""),
    ],
)
def test_of_experts(
    family: str, argv: tuple[str, ...], said: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy(rows / "model") if family == "dense" else make_family(rows / "model", family)
    code, lines = checked(argv, capsys)
    assert code == (3 if said else 0), lines
    assert said in lines


ROWS_OF_ONE = ("--rollout.batch-size", "8", "--rollout.group-size", "2", "--train.batch-size", "16")
GRPO = (
    *("grpo", "--policy.model", "model", "--data.path", "rows.jsonl", "--data.template", "plain", *ROWS_OF_ONE),
    *("--reward.rules", "math", "--data.label-key", "response", "--train.num-steps", "1", "--rollout.router-replay"),
    *("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "16"),
)


@pytest.mark.parametrize(
    ("family", "argv", "said"),
    [
        ("qwen3_moe", (), ""),
        ("mixtral", (), ""),
        ("dense", (), "rollout.router_replay: a LlamaForCausalLM has no routers"),
        ("deepseek_v3", (), "rollout.router_replay: routers of a DeepseekV3ForCausalLM do not choose experts"),
        ("qwen3_moe", ("--rollout.engine", "transformers"), "the transformers engine does not record which experts"),
        (
            "qwen3_moe",
            ("--rollout.sync-adapters", "--policy.lora.rank", "4"),
            "is not known to work with adapters that the engine applies itself",
        ),
    ],
)
def test_of_router_replay(
    family: str, argv: tuple[str, ...], said: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy(rows / "model") if family == "dense" else make_family(rows / "model", family)
    code = main(["check", *GRPO, *argv])
    lines = capsys.readouterr().err
    assert bool(code) == bool(said), lines
    assert said in lines


def test_of_routers_that_contradict_each_other(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_family(rows / "model", "qwen3_moe")
    code, lines = checked(("--policy.freeze-router", "--algo.router-aux-coef", "0.01"), capsys)
    assert code == 2
    assert "--policy.freeze-router: routers that do not learn cannot be balanced (algo.router_aux_coef 0.01)" in lines


@pytest.mark.parametrize(("attention", "code"), [("sdpa", 3), ("eager", 0), ("auto", 0)])
def test_of_attention_that_leaves_out_a_cap_on_scores(
    attention: str, code: int, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_family("gemma2").save_pretrained(rows / "model")
    tiny_tokenizer().save_pretrained(rows / "model")
    found, lines = checked(("--policy.attention", attention), capsys)
    assert found == code, lines
    if code:
        assert "--policy.attention: sdpa knows no cap on attention scores, which model has. Set auto or eager." in lines
