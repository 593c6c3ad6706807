"""Loading models and tokenizers, and what their forward pass returns."""
