"""`python -m rlhf.cli.pages.failures docs/failures.md`: writes its table of exit codes from the error classes."""

import sys
from pathlib import Path

from rlhf.cli.main import EXIT_CLOSED_PIPE, EXIT_INTERRUPTED
from rlhf.errors import error_classes

BEGIN = "<!-- Written by `python -m rlhf.cli.pages.failures docs/failures.md`. Edit rlhf/errors.py. -->\n"
END = "<!-- end -->\n"


def table() -> str:
    """Every way in which a command ends."""
    rows = [("0", "", "done", "")]
    rows += [(str(kind.exit_code), f"`{kind.__name__}`", kind.meaning, kind.advice) for kind in error_classes()]
    rows.append((str(EXIT_INTERRUPTED), "", "Ctrl-C before the run began", ""))
    rows.append((str(EXIT_CLOSED_PIPE), "", "the reader of the output closed the pipe", ""))
    rows.sort(key=lambda row: int(row[0]))
    head = "| code | error in status.json | what it means | what to do |\n|---|---|---|---|\n"
    return head + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def written(page: str) -> str:
    """The page with its table up to date."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def main() -> None:
    """Rewrite the table in the named file."""
    file = Path(sys.argv[1])
    file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
