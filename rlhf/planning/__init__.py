"""Where a run's models are placed and what that costs, as pure functions of config and cluster. Starts nothing."""
