"""Models and plans that the tests of planning share."""

from collections.abc import Mapping, Sequence

from rlhf.algorithms import build_algorithm
from rlhf.config.loading.load import load_config
from rlhf.planning.hardware import parse_cluster
from rlhf.planning.model_shape import ModelShape, model_shape
from rlhf.planning.plan import Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import sections
from rlhf.planning.workload import LIMITS, Lengths
from rlhf.types import Role

LLAMA_3_8B: Mapping[str, object] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_3_70B: Mapping[str, object] = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_3_30B: Mapping[str, object] = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
    **{"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
    **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
}
RUN = ("--policy.model", "org/policy", "--data.path", "prompts.jsonl")


def shape_of(config: Mapping[str, object]) -> ModelShape:
    return model_shape("policy.model", config)


def plan_for(
    command: str,
    flags: Sequence[str],
    cluster: str,
    model: Mapping[str, object] = LLAMA_3_8B,
    lengths: Lengths = LIMITS,
    *,
    others: Mapping[Role, Mapping[str, object]] | None = None,
) -> Plan:
    """The plan of a run in which every role has `model`, but for `others`."""
    config = load_config(command, [*flags, *RUN], {})
    needs = build_algorithm(config.algo).needs
    shapes = {role: shape_of((others or {}).get(role, model)) for role in sections(config, needs)}
    return plan_run(config, needs, shapes, parse_cluster(cluster), lengths=lengths)
