"""What all tests share."""

import os

# Before anything starts OpenMP. Tests run side by side, with more threads than cores: one that polls while it waits for
# the others takes a core from the one that it waits for (`rlhf.actors.environment`, which does the same in runs).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
