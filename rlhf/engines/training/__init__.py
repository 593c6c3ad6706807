"""Training and scoring models with DeepSpeed."""
