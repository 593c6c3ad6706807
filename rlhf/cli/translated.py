"""What a launch command in OpenRLHF's flags became, shown before the command runs or is refused."""

import shlex
from collections.abc import Sequence

from rlhf.config.commands import COMMANDS
from rlhf.config.fields import fields_by_name
from rlhf.config.loading.openrlhf import translate
from rlhf.terminal import tell


def show_translation(verb: str, command: str, argv: Sequence[str]) -> None:
    """Print to stderr what each flag of OpenRLHF in `argv` became, and the same command in this project's own flags.
    Prints nothing where there is no such flag."""
    translation = translate(argv, fields_by_name(COMMANDS[command].config))
    if not translation.became:
        return
    own = shlex.join(["rlhf", verb, command, *translation.argv])
    lines = ["flags of OpenRLHF were given:", *(f"  {line}" for line in translation.lines), f"the same command: {own}"]
    tell(f"rlhf: {line}" for line in lines)
