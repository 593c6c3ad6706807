"""What a step does: sample, score, compute log-probs, batch, learn."""
