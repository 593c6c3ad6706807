"""Where a run's models live and what that costs, as pure functions of config and cluster. Starts nothing."""
