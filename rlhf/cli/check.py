"""`rlhf check`: whether a run can start, as far as that can be checked without starting it."""

import sys
from collections.abc import Mapping, Sequence

from rlhf.config.loading.load import short_summary
from rlhf.launch.check import checked_config


def run_check(command: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`rlhf check COMMAND ARGV`: print what differs from the defaults, or raise with every problem."""
    config, advice = checked_config(command, argv, environ)
    sys.stderr.writelines(f"rlhf: warning: {line}\n" for line in advice)
    sys.stdout.write(f"{short_summary(config)}\nThis run can start, as far as can be known without starting it.\n")
    return 0
