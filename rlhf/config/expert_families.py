"""Which mixtures of experts DeepSpeed's AutoEP can spread over processes."""

SPLIT_FAMILIES = frozenset(
    ("deepseek_v2", "deepseek_v3", "minimax_m3_vl_text", "mixtral", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe")
)
"""Their model_type in config.json."""
FLOAT32_ROUTERS = frozenset(("deepseek_v2", "deepseek_v3"))
"""Those whose routers compute in float32 in every model."""
