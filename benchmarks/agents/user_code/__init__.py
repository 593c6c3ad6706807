"""What a user would write for the runs of this benchmark: a tool, an environment and two loops."""
