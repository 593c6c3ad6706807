"""All benchmarks, one after the other: `make bench`. Each runs alone too, and says what it measures with --help."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = (
    ["log_prob_memory.py"],
    ["weight_sync.py"],
    ["ppo_step.py", "--model", "tiny"],
    ["ppo_step.py", "--model", "25m", "--prompts", "32", "--tokens", "128", "--steps", "3"],
)


def main() -> int:
    codes = [
        subprocess.run([sys.executable, str(HERE / name), *flags], check=False).returncode
        for name, *flags in BENCHMARKS
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
