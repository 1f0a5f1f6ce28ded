"""Read and change Python programs: names, literals, small mistakes."""

import ast
import copy
import io
import random
import re
import symtable
import tokenize
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar


def mutants(program: str, rng: random.Random, most: int = 8) -> list[str]:
    """Mutants of a program, in random order. Each changes a constant, an operator, a condition, a bound or a call.

    Args:
        program: Python source. Source that cannot be parsed has no mutants.
        rng: Random generator.
        most: Number of mutants at most.
    """
    tree = parsed(program)
    if tree is None:
        return []
    sites = [(place, change) for place, node in enumerate(ast.walk(tree)) for change in _changes(node)]
    rng.shuffle(sites)
    texts: dict[str, None] = {}
    for place, change in sites:
        mutated = copy.deepcopy(tree)
        change(next(node for number, node in enumerate(ast.walk(mutated)) if number == place))
        texts[ast.unparse(ast.fix_missing_locations(mutated)) + "\n"] = None
        if len(texts) == most:
            break
    texts.pop(ast.unparse(tree) + "\n", None)
    return list(texts)


_COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}


def _changes(node: ast.AST) -> list[Callable[[Any], None]]:
    """Functions that turn a node of this type into a small mistake."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
        return [lambda n: setattr(n, "value", n.value + 1), lambda n: setattr(n, "value", n.value - 1)]
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return [lambda n: setattr(n, "ops", [_COMPARE[type(n.ops[0])]()])]
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC:
        return [lambda n: setattr(n, "op", _ARITHMETIC[type(n.op)]())]
    if isinstance(node, ast.BoolOp):
        return [lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())]
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Constant):
        return [lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))]
    if isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
        return [lambda n: n.args.reverse()]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
        return [lambda n: setattr(n.func, "id", "max" if n.func.id == "min" else "min")]
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1:
        return [lambda n: n.value.elts.reverse()]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.lower is not None:
        return [lambda n: setattr(n.slice, "lower", None)]
    return []


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of a program; ``None`` if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def is_docstring(node: ast.stmt) -> bool:
    """Whether a statement is a string on its own."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class Counting(ast.NodeTransformer):
    """Base of transformers that count their changes."""

    def __init__(self) -> None:
        self.count = 0


class Flip(Counting):
    """Flips comparisons: ``a < b`` to ``b > a``."""

    _mirrored: ClassVar[dict[type[ast.cmpop], type[ast.cmpop]]] = {
        ast.Lt: ast.Gt,
        ast.Gt: ast.Lt,
        ast.LtE: ast.GtE,
        ast.GtE: ast.LtE,
        ast.Eq: ast.Eq,
        ast.NotEq: ast.NotEq,
    }

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or type(node.ops[0]) not in self._mirrored:
            return node
        self.count += 1
        return ast.Compare(node.comparators[0], [self._mirrored[type(node.ops[0])]()], [node.left])


class Swap(Counting):
    """Swaps branches and negates their condition."""

    def visit_If(self, node: ast.If) -> ast.stmt:
        self.generic_visit(node)
        if not node.orelse or (len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)):
            return node
        self.count += 1
        return ast.If(ast.UnaryOp(ast.Not(), node.test), node.orelse, node.body)


class Unroll(Counting):
    """Turns ``for`` loops into ``while`` loops over an iterator."""

    def visit_For(self, node: ast.For) -> Any:
        self.generic_visit(node)
        if node.orelse:
            return node
        self.count += 1
        name = f"iterator_{self.count}"
        start = ast.Assign([ast.Name(name, ast.Store())], ast.Call(ast.Name("iter", ast.Load()), [node.iter], []))
        take = ast.Assign([node.target], ast.Call(ast.Name("next", ast.Load()), [ast.Name(name, ast.Load())], []))
        ended = ast.ExceptHandler(ast.Name("StopIteration", ast.Load()), None, [ast.Break()])
        return [start, ast.While(ast.Constant(True), [ast.Try([take], [ended], [], []), *node.body], [])]


class Equivalents(Counting):
    """Replaces calls and displays by equivalent ones."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.keywords:
            return node
        made: ast.expr = node
        if node.func.id == "list" and not node.args:
            made = ast.List([], ast.Load())
        elif node.func.id == "dict" and not node.args:
            made = ast.Dict([], [])
        elif node.func.id == "str" and len(node.args) == 1 and not isinstance(node.args[0], ast.Starred):
            made = ast.JoinedStr([ast.FormattedValue(node.args[0], -1)])
        self.count += made is not node
        return made

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        self.generic_visit(node)
        self.count += 1
        return ast.Call(ast.Name("list", ast.Load()), [ast.GeneratorExp(node.elt, node.generators)], [])

    def visit_List(self, node: ast.List) -> ast.expr:
        self.generic_visit(node)
        if node.elts or not isinstance(node.ctx, ast.Load):
            return node
        self.count += 1
        return ast.Call(ast.Name("list", ast.Load()), [], [])

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        number = isinstance(node.value, ast.Constant) and isinstance(node.value.value, int | float)
        if not isinstance(node.target, ast.Name) or not number:
            return node  # a list would no longer be changed in place
        self.count += 1
        return ast.Assign([node.target], ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value))


class Renamer(ast.NodeTransformer):
    """Renames names where they are bound or read, and in docstrings if they have three letters or more."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        words = sorted((name for name in names if len(name) > 2), key=len, reverse=True)
        self._words = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b") if words else None

    def visit(self, node: ast.AST) -> Any:
        for attribute in ("id", "arg", "name"):  # `arg` of a keyword belongs to what is called
            name = getattr(node, attribute, None)
            if (
                isinstance(name, str)
                and name in self.names
                and not isinstance(node, ast.keyword | ast.alias | _DEFINES)
            ):
                setattr(node, attribute, self.names[name])
        if isinstance(node, ast.Nonlocal):
            node.names = [self.names.get(name, name) for name in node.names]
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_docstring(body[0]) and self._words is not None:
            lines = body[0].value.value.splitlines(keepends=True)
            body[0].value.value = "".join(map(self._in_prose, lines))
        return self.generic_visit(node)

    def _in_prose(self, line: str) -> str:
        """Rename in a line of a docstring, except in examples and quotations."""
        if self._words is None or any(mark in line for mark in (">>>", '"', "'")):
            return line
        return self._words.sub(lambda m: self.names[m[0]], line)


_DEFINES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def local_names(source: str) -> set[str]:
    """Local names of functions: parameters and assigned names."""
    names: set[str] = set()

    def walk(table: symtable.SymbolTable) -> None:
        if table.get_type() == "function":
            for symbol in table.get_symbols():
                if symbol.is_local() and not symbol.is_imported() and not symbol.is_namespace():
                    names.add(symbol.get_name())
        for child in table.get_children():
            walk(child)

    walk(symtable.symtable(source, "example", "exec"))
    return {name for name in names if name.isidentifier() and name not in ("self", "cls", "_") and name[:2] != "__"}


def names_elsewhere(tree: ast.Module) -> set[str]:
    """Names that mean something outside of functions too, or that callers use: they must stay."""
    top = {symbol.get_name() for symbol in symtable.symtable(ast.unparse(tree), "example", "exec").get_symbols()}
    in_classes = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        for target in ast.walk(statement)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name)
    }
    defined = {node.name for node in ast.walk(tree) if isinstance(node, _DEFINES)}
    return top | in_classes | defined | keywords_of(tree)


def keywords_of(tree: ast.AST) -> set[str]:
    """Names of keyword arguments in calls."""
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}


def attributes_of(tree: ast.AST) -> set[str]:
    """Names of attributes."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def camel_case(name: str) -> str:
    """Convert ``like_this`` to ``likeThis``."""
    first, *others = [word for word in name.split("_") if word] or [name]
    return first[:1].lower() + first[1:] + "".join(word[:1].upper() + word[1:] for word in others)


def with_token(source: str, old: str, new: str) -> str | None:
    """Python source with one name replaced wherever it is a token; ``None`` if it cannot be tokenised."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    lines = source.splitlines(keepends=True)
    for token, previous in reversed(
        list(zip(tokens[1:], tokens, strict=False)) + ([(tokens[0], None)] if tokens else [])
    ):
        if token.type == tokenize.NAME and token.string == old and (previous is None or previous.string != "."):
            row, start = token.start
            line = lines[row - 1]
            lines[row - 1] = line[:start] + new + line[start + len(old) :]
    return "".join(lines)


def asserted_calls(tests: str, entry_point: Sequence[str]) -> list[ast.Call]:
    """The calls of ``assert f(...) == ...`` whose arguments are all literals."""
    tree = parsed(tests)
    calls = []
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and isinstance(node.test.left, ast.Call):
            call = node.test.left
            named = isinstance(call.func, ast.Name) and call.func.id in entry_point
            if named and call.args and not call.keywords and all(is_literal(ast.unparse(arg)) for arg in call.args):
                calls.append(call)
    return calls


def is_literal(text: str) -> bool:
    """Whether a text is a literal that equals itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return bool(value == value)  # no NaN


def type_asserted(tests: str, call: ast.Call) -> str | None:
    """Type of a call's result, if its assertion compares with a literal of an unambiguous type."""
    tree = parsed(tests)
    for node in tree.body if tree else ():
        test = node.test if isinstance(node, ast.Assert) else None
        if not isinstance(test, ast.Compare) or ast.unparse(test.left) != ast.unparse(call):
            continue
        if is_literal(ast.unparse(test.comparators[0])):
            value = ast.literal_eval(test.comparators[0])
            return type(value).__name__ if type(value) in (bool, str, list, tuple, dict, set) else None
    return None


def perturbed(call: ast.Call, rng: random.Random) -> ast.Call | None:
    """A call with one literal slightly changed."""
    new = copy.deepcopy(call)
    sizes = {len(n.elts) for a in new.args for n in ast.walk(a) if isinstance(n, ast.List | ast.Tuple)}
    nodes: list[Any] = [node for argument in new.args for node in ast.walk(argument)]
    sizes |= {len(node.value) for node in nodes if _is_text(node)}
    negative = {id(node.operand) for node in nodes if isinstance(node, ast.UnaryOp)}
    # A number below 1, or one that is the length of something, may mean more than its value.
    whole = [n for n in nodes if _is_whole(n) and n.value >= 1 and n.value not in sizes and id(n) not in negative]
    places = whole + [node for node in nodes if _is_text(node) and len(node.value) > 1]
    if not places:
        return None
    node = rng.choice(places)
    if isinstance(node.value, str):
        letters = list(node.value)
        rng.shuffle(letters)
        node.value = "".join(letters)
    else:
        node.value += rng.choice((1, 2, 3))
    return new


def _is_whole(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool)


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
