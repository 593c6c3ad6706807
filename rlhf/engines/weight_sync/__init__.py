"""How the policy's weights reach the rollout engines: one file per medium, chosen in `media`."""
