"""
Arithmetic for models, which are bad at it. An expression is read as a tree and worked out here: nothing is executed.

Every step is bounded: the size of whole numbers in digits, exponents, and the number of parts of the expression.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from sutazai.core.errors import BadRequest

Number = int | float

MAX_CHARACTERS = 1000
MAX_PARTS = 200
MAX_BITS = 4096
"""Of a whole number: about 1,200 digits."""
MAX_FACTORIAL = 400
MAX_DIGITS = 300
"""To round to, on either side of the point: Python takes ten to that power."""
MAX_DEPTH = 50

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SIGNS: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": lambda number, digits=0: round(number, _at_most(digits, MAX_DIGITS)) if digits else round(number),
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "gcd": math.gcd,
    "factorial": lambda number: math.factorial(_at_most(number, MAX_FACTORIAL)),
}


def calculated(expression: str) -> Number:
    """The value of an expression such as `2 ** 10 + sqrt(2)`. Raises `BadRequest`, and nothing else for any text."""
    if len(expression) > MAX_CHARACTERS:
        raise BadRequest(f"The expression had more than {MAX_CHARACTERS} characters. Split it.")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_PARTS:
            raise BadRequest(f"The expression had more than {MAX_PARTS} parts. Split it.")
        return _value(tree.body, 0)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise BadRequest("The expression was not understood. Write numbers, + - * / // % **, and functions.") from error
    except (ArithmeticError, ValueError, TypeError) as error:
        raise BadRequest(f"The expression has no value: {error}.") from error


def _value(node: ast.expr, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise BadRequest(f"The expression was nested more than {MAX_DEPTH} deep. Split it.")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=sign, operand=part) if type(sign) in _SIGNS:
            return _bounded(_SIGNS[type(sign)](_value(part, depth + 1)))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, depth + 1), _value(right, depth + 1))
        case ast.BinOp(left=left, op=step, right=right) if type(step) in _OPERATORS:
            return _bounded(_OPERATORS[type(step)](_value(left, depth + 1), _value(right, depth + 1)))
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*(_value(part, depth + 1) for part in parts)))
    raise BadRequest(f"The expression used {type(node).__name__}, which is not known here.")


def _power(base: Number, exponent: Number) -> Number:
    """Refused before it is worked out where it would be too large."""
    if isinstance(base, int) and isinstance(exponent, int):
        if abs(base) > 1 and abs(exponent) * base.bit_length() > 2 * MAX_BITS:
            raise BadRequest("The power was too large to work out. Use numbers with a decimal point.")
        if exponent < 0:
            return _bounded(float(base) ** exponent)
    return _bounded(base**exponent)


def _bounded(value: object) -> Number:
    if not isinstance(value, int | float):  # the root of a negative number is complex
        raise BadRequest("The expression has no real value.")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise BadRequest("A number had more digits than are worked with. Use numbers with a decimal point.")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest("A number was too large.")
    return value


def _at_most(number: Number, bound: int) -> int:
    if not isinstance(number, int) or abs(number) > bound:
        raise BadRequest(f"A whole number up to {bound} was wanted there.")
    return number
