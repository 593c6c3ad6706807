"""Sizes that vLLM does not support are refused by the setting that helps."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.engine_limits import EngineSizes, vllm_limit
from rlhf.config.model_files import ModelFacts, describe_model
from tests.family_models import WIDE_LINEAR, write_family
from tests.tiny_models import make_family, make_policy


def facts(**sizes: object) -> ModelFacts:
    plain = ModelFacts(
        folder=Path("m"),
        model_type="llama",
        vocab_size=None,
        context=None,
        num_labels=None,
        has_chat_template=False,
        has_own_code=False,
    )
    return replace(plain, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "engine", "on_cpu", "expected"),
    [
        (
            {"num_heads": 2},
            4,
            False,
            ("tensor_parallel_size", "2 attention heads do not split over 4"),
        ),
        ({"num_heads": 8, "num_kv_heads": 2}, 4, False, None),
        ({"num_heads": 12, "num_kv_heads": 4}, 6, False, ("tensor_parallel_size", "4 key-value heads do not split")),
        ({"num_heads": 12, "num_kv_heads": 4, "width": 10}, 4, False, ("tensor_parallel_size", "10 intermediate")),
        ({"num_heads": 2, "head_dim": 16}, 1, True, ("engine", "no attention for heads of 16 dimensions")),
        ({"num_heads": 2, "head_dim": 16}, 2, False, None),
        ({"num_heads": 2, "head_dim": 64}, 1, True, None),
        (
            {"num_heads": 6, "vocab_size": 100},
            3,
            False,
            ("tensor_parallel_size", "128 tokens (a vocabulary of 100, pad"),
        ),
        ({"num_heads": 6, "vocab_size": 192}, 3, False, None),
        ({"num_heads": 6, "vocab_size": 129}, 3, False, None),
        ({"latent_size": 96}, 1, True, ("engine", "compressed keys and values of 96 dimensions")),
        ({"latent_size": 576}, 1, True, None),
        ({"latent_size": 96}, 1, False, None),
        ({"latent_size": 576, "has_sparse_attention": True}, 1, True, ("engine", "no sparse attention (index_topk)")),
        ({"latent_size": 576, "has_sparse_attention": True}, 1, False, None),
        ({"has_sparse_attention": True}, 1, True, None),
        ({"latent_size": 96, "model_type": "minicpm3"}, 1, True, None),
        ({"has_gated_delta": True}, 1, True, ("engine", "(gated delta rule) in bfloat16 alone, and dtype is float32")),
        ({"has_gated_delta": True}, 1, False, None),
        ({}, 8, True, None),
        ({"num_layers": 3}, EngineSizes(stages=3), True, None),
        (
            {"num_layers": 3},
            EngineSizes(stages=4),
            False,
            ("pipeline_parallel_size", "3 layers do not make 4 stages. Use at most 3"),
        ),
        ({"num_layers": 3}, EngineSizes(4), False, None),
        ({}, EngineSizes(stages=4), False, None),
        (
            {"num_layers": 8, "architecture": "Mamba2ForCausalLM"},
            EngineSizes(stages=2),
            False,
            ("pipeline_parallel_size", "vLLM does not split Mamba2ForCausalLM into stages"),
        ),
        ({"num_layers": 8, "architecture": "Mamba2ForCausalLM"}, EngineSizes(2), False, None),
        ({"num_layers": 2, "num_experts": 8}, EngineSizes(4, has_whole_experts=True), False, None),
        ({"num_layers": 2, "num_experts": 6}, EngineSizes(4, has_whole_experts=True), False, None),
        ({"num_layers": 2, "num_experts": 8, "width": 10}, EngineSizes(4, has_whole_experts=True), False, None),
        (
            {"num_heads": 2, "num_experts": 8},
            EngineSizes(4, has_whole_experts=True),
            False,
            ("tensor_parallel_size", "2"),
        ),
        (
            {"num_layers": 2, "num_experts": 2},
            EngineSizes(4, has_whole_experts=True),
            False,
            ("expert_parallel", "2 experts cannot be divided among 4 GPUs"),
        ),
        ({"num_layers": 2}, EngineSizes(4, has_whole_experts=True), False, ("expert_parallel", "m has no experts")),
        (
            {"num_layers": 2, "num_experts": 8},
            EngineSizes(4, has_whole_experts=True),
            True,
            ("expert_parallel", "vLLM has no kernel for it on CPUs"),
        ),
    ],
)
def test_limits(
    sizes: dict[str, int | str], engine: int | EngineSizes, on_cpu: bool, expected: tuple[str, str] | None
) -> None:
    """`engine` is a number of tensor parallel GPUs, if it has nothing else."""
    asked = EngineSizes(engine) if isinstance(engine, int) else engine
    limit = vllm_limit(facts(**sizes), asked, on_cpu=on_cpu, dtype="float32")
    if expected is None:
        assert limit is None
        return
    assert limit is not None
    assert limit.setting == expected[0]
    assert limit.text.startswith(expected[1]) or expected[1] in limit.text


@pytest.mark.parametrize(("sizes", "found"), [({32}, "32"), ({256}, "256"), ({128, 64}, "64 and 128")])
def test_linear_attention_in_bfloat16_needs_heads_that_vllm_has(sizes: set[int], found: str) -> None:
    states = facts(has_gated_delta=True, gated_delta_sizes=frozenset(sizes), head_dim=64)
    limit = vllm_limit(states, EngineSizes(), on_cpu=True, dtype="bfloat16")
    assert limit is not None
    assert limit.setting == "engine"
    assert f"for heads of {found} dimensions, only 64 or 128, the same for keys and values" in limit.text
    assert vllm_limit(states, EngineSizes(), on_cpu=False, dtype="bfloat16") is None


@pytest.mark.parametrize("sizes", [set(), {64}, {128}])
def test_linear_attention_in_bfloat16_is_not_refused(sizes: set[int]) -> None:
    states = facts(has_gated_delta=True, gated_delta_sizes=frozenset(sizes), head_dim=64)
    assert vllm_limit(states, EngineSizes(), on_cpu=True, dtype="bfloat16") is None
    limit = vllm_limit(replace(states, head_dim=16), EngineSizes(), on_cpu=True, dtype="bfloat16")
    assert limit is not None
    assert "no attention for heads of 16 dimensions" in limit.text


def test_sizes_are_read_from_the_config(tmp_path: Path) -> None:
    dense, experts = make_policy(tmp_path / "dense"), make_family(tmp_path / "experts", "qwen3_moe")
    latent = make_family(tmp_path / "latent", "deepseek_v3")
    found = [describe_model(folder) for folder in (dense, experts, latent)]
    assert [(f.num_heads, f.num_kv_heads, f.head_dim, f.width, f.latent_size) for f in found] == [
        (2, 1, 32, 96, None),
        (2, 1, 32, 32, None),
        (2, 2, None, 32, 48),
    ]
    assert [(f.architecture, f.num_layers, f.num_experts) for f in found] == [
        ("LlamaForCausalLM", 2, None),
        ("Qwen3MoeForCausalLM", 2, 4),
        ("DeepseekV3ForCausalLM", 2, 4),
    ]
    assert not any(f.has_sparse_attention or f.has_gated_delta for f in found)
    assert not any(f.gated_delta_sizes for f in found)
    states = describe_model(write_family(tmp_path / "states", "qwen3_5_text"))
    tower = describe_model(write_family(tmp_path / "tower", "qwen3_5", WIDE_LINEAR))
    assert (states.has_gated_delta, states.gated_delta_sizes) == (True, {16})
    assert (tower.has_gated_delta, tower.gated_delta_sizes) == (True, {64})
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    (sparse / "config.json").write_text(
        '{"model_type": "deepseek_v32", "index_topk": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64}'
    )
    fact = describe_model(sparse)
    assert (fact.latent_size, fact.has_sparse_attention) == (576, True)


def test_a_check_names_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_policy(tmp_path / "model")
    Path("rows.jsonl").write_text('{"prompt": "a"}\n' * 64)
    Path("rewards_of_limits.py").write_text("def score(prompts, responses): return [0.0] * len(prompts)\n")
    code = main(
        [
            *("check", "grpo", "--policy.model", "model", "--data.path", "rows.jsonl", "--rollout.engine", "vllm"),
            *("--reward.function", "rewards_of_limits:score", "--rollout.tensor-parallel-size", "4"),
            *("--rollout.max-prompt-tokens", "64", "--rollout.max-response-tokens", "64", "--data.template", "plain"),
        ]
    )
    assert code == 2
    lines = capsys.readouterr().err
    assert "--rollout.tensor-parallel-size" in lines
    assert "2 attention heads do not split over 4 GPUs. Use one of 1, 2." in lines


@pytest.mark.parametrize(
    ("words", "changes", "refusal"),
    [
        ((), WIDE_LINEAR, "and dtype is float32. Use transformers"),
        (("--policy.dtype", "bfloat16"), {}, "for heads of 16 dimensions, only 64 or 128"),
        (("--policy.dtype", "bfloat16"), WIDE_LINEAR, None),
    ],
)
def test_a_check_refuses_linear_attention_that_vllm_lacks(
    words: tuple[str, ...],
    changes: dict[str, int],
    refusal: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path / "model", "qwen3_5_text", changes)
    Path("rows.jsonl").write_text('{"prompt": "a"}\n' * 64)
    main(
        [
            *("check", "grpo", "--policy.model", "model", "--data.path", "rows.jsonl", "--rollout.engine", "vllm"),
            *("--reward.rules", "math", "--rollout.max-prompt-tokens", "64", "--rollout.max-response-tokens", "64"),
            *("--data.template", "plain", *words),
        ]
    )
    lines = capsys.readouterr().err
    assert ("--rollout.engine" in lines and "linear attention" in lines) == (refusal is not None)
    assert refusal is None or refusal in lines
