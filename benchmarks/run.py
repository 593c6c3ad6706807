"""The benchmarks of speed and memory, one after the other: `make bench`. Each runs alone too, as
`python -m benchmarks.NAME`, and says what it measures with --help."""

import subprocess
import sys

BENCHMARKS = (
    ["log_prob_memory"],
    ["weight_sync"],
    ["ppo_step", "--model", "tiny"],
    ["ppo_step", "--model", "25m", "--prompts", "32", "--tokens", "128", "--steps", "3"],
    ["driver"],
)


def main() -> int:
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=False).returncode
        for name, *flags in BENCHMARKS
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
