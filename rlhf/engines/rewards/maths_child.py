"""Compares expressions; imported by child processes alone, each of which is killed where it takes too long.

Nothing here turns text into code. math-verify reads LaTeX by a grammar of its own, and leaves two roads to `eval`.
Plain expressions go through sympy's `parse_expr`, which is not asked for; numbers go through `sympify`, which calls it.
A third is `lambdify`, which prints symbols, whose names the text chooses, as Python. So sympy reads numbers and names
alone here, and the process refuses to compile what any of these modules asks for.
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
"""Modules that compile what they print or read; sympy's other generated code holds counts alone."""


def equal(labels: list[str], answers: list[str]) -> list[float]:
    """1.0 for each answer that equals its label, both LaTeX without delimiters; else 0.0."""
    return [float(equals(label, answer)) for label, answer in zip(labels, answers, strict=True)]


def equals(label: str, answer: str) -> bool:
    """Whether an answer is mathematically the label. What cannot be read equals its own text alone."""
    try:
        return bool(verify(read(label), read(answer), timeout_seconds=None))
    except (Exception, MemoryError):
        return False


def read(text: str) -> list[sympy.Basic | sympy.MatrixBase | str]:
    found: list[sympy.Basic | sympy.MatrixBase | str] = parse(f"${text}$", LATEX, parsing_timeout=None)
    return found


def read_atom(text: str, **_options: object) -> sympy.Expr:
    """Stands in for `parse_expr`: a number by its digits, a name as a symbol."""
    if INTEGER.fullmatch(text):
        return sympy.Integer(int(text))
    if DECIMAL.fullmatch(text):
        return sympy.Float(text)
    if text.isidentifier():
        return sympy.Symbol(text)
    raise SyntaxError("neither a number nor a name")


def refuse_code(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: nothing is started, and what sympy makes from an expression's text does not become code."""
    maker = sys._getframe(1).f_globals.get("__name__", "") if event == "compile" else ""
    if event in STARTS or maker.startswith(CODE_MAKERS):
        raise PermissionError("text is not run as code here")


# `sympify` looks it up there at each call.
sympy_parser.parse_expr = read_atom
# The deadline is the parent's; the library would warn about each call without one of its own.
logging.getLogger("math_verify").setLevel(logging.ERROR)
sys.addaudithook(refuse_code)
