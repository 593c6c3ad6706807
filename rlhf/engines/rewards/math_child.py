"""Compares expressions; imported in child processes only, which are killed if they take too long.

Nothing here may run text as code. math-verify parses LaTeX by its own grammar, but text can still reach `eval` in three
ways: plain expressions through sympy's `parse_expr`, which is not used here; numbers through `sympify`, which calls
`parse_expr`; and `lambdify`, which prints symbols, with names from the text, as Python. So sympy may only read numbers
and names here, and an audit hook stops these modules from compiling code.
"""

import logging
import re
import sys

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

LATEX = (LatexExtractionConfig(),)
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,1000}\.?[0-9]{0,1000}|\.[0-9]{1,1000})(?:[eE][+-]?[0-9]{1,3})?")
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"}
CODE_MAKERS = ("sympy.parsing", "sympy.core.sympify", "sympy.utilities.lambdify")
"""Modules that compile what they read or print; other code that sympy generates contains only counts."""


def equal(labels: list[str], answers: list[str]) -> list[float]:
    """1.0 for each answer that equals its label, both as LaTeX without delimiters; else 0.0."""
    return [float(equals(label, answer)) for label, answer in zip(labels, answers, strict=True)]


def equals(label: str, answer: str) -> bool:
    """Whether an answer is mathematically equal to the label. Unreadable text equals only itself."""
    try:
        return bool(verify(read(label), read(answer), timeout_seconds=None))
    except (Exception, MemoryError):
        return False


def read(text: str) -> list[sympy.Basic | sympy.MatrixBase | str]:
    found: list[sympy.Basic | sympy.MatrixBase | str] = parse(f"${text}$", LATEX, parsing_timeout=None)
    return found


def read_atom(text: str, **_options: object) -> sympy.Expr:
    """Replaces `parse_expr`: reads a number or the name of a symbol."""
    if INTEGER.fullmatch(text):
        return sympy.Integer(int(text))
    if DECIMAL.fullmatch(text):
        return sympy.Float(text)
    if text.isidentifier():
        return sympy.Symbol(text)
    raise SyntaxError("neither a number nor a name")


def refuse_code(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: no process is started, and nothing that sympy makes from an expression's text is compiled."""
    maker = sys._getframe(1).f_globals.get("__name__", "") if event == "compile" else ""
    if event in STARTS or maker.startswith(CODE_MAKERS):
        raise PermissionError("text is not run as code here")


# `sympify` looks up `parse_expr` there at each call.
sympy_parser.parse_expr = read_atom
# The parent enforces the timeout; the library would warn about each call without a timeout of its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)
sys.addaudithook(refuse_code)
