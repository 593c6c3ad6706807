"""From files, environment and flags to a validated config."""
