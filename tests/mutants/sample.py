"""Choose a sample of the mutants that cosmic-ray can make, spread over the files.

The choice depends on the text of a line and the seed, not on line numbers, so an edit changes the mutants of
the lines that it touches and few others.
"""

import ast
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

_ARITHMETIC, _BITWISE = "Add|Sub|Mul|Div|FloorDiv|Mod|Pow", "RShift|LShift|BitOr|BitAnd|BitXor"
LEFT_OUT = re.compile(
    rf"core/(ReplaceBinaryOperator_(({_ARITHMETIC})_({_BITWISE})|({_BITWISE})_({_ARITHMETIC}))"
    r"|ReplaceComparisonOperator_(?!Is)\w+_Is(Not)?|Variable.*)"
)
"""Excluded operators: arithmetic to bitwise operators and back, which tensors reject anyway; `==` or `<` to
`is`, which is equivalent for interned values; and operators that need arguments."""
AT_LEAST = 2
"""Minimum number of mutants per file, if it has that many places."""


@dataclass(frozen=True)
class Place:
    """A span of a file's text that operators can change."""

    file: str
    definition: str
    """Name of the enclosing function or class; empty at module level."""
    line: int
    column: int
    text: str
    """The full line."""
    changes: tuple[tuple[str, int], ...]
    """(operator name, occurrence) of each mutant of this place."""

    @property
    def where(self) -> tuple[str, str, str, int]:
        """Identity of the place, unique except for equal lines in one function."""
        return self.file, self.definition, self.text, self.column


@dataclass(frozen=True)
class Mutant:
    """A file with one change."""

    file: str
    definition: str
    line: int
    source: str
    """Source of the changed file."""
    removed: str
    """The original lines, joined into one."""
    added: str
    """The changed lines, joined into one."""

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Identity of the mutant, as in equivalent.txt."""
        return self.file, self.definition, self.removed, self.added

    @property
    def text(self) -> str:
        """Format the mutant as in equivalent.txt."""
        return f"{self.file}, {self.definition}".rstrip() + f"\n- {self.removed}\n+ {self.added}".rstrip()


def choose(root: Path, files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Choose `count` mutants of these files below `root`, sorted by file and line; deterministic per seed."""
    sources = {file: (root / file).read_text() for file in files}
    places = {file: places_of(file, source) for file, source in sources.items()}
    shares = shares_of({file: len(found) for file, found in places.items()}, count)
    chosen: list[Mutant] = []
    for file in files:
        ranked = sorted(places[file], key=lambda place: (_rank(seed, *place.where), place.line))
        mutants = (mutant for place in ranked for mutant in _first(sources[file], place, seed))
        some = [mutant for mutant, _ in zip(mutants, range(shares[file]), strict=False)]
        chosen += sorted(some, key=lambda mutant: mutant.line)
    return chosen


def shares_of(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Divide `count` among files with these numbers of places: AT_LEAST each, the rest in proportion."""
    least = {file: min(AT_LEAST, size) for file, size in sizes.items()}
    left = {file: size - least[file] for file, size in sizes.items()}
    rest, total = count - sum(least.values()), sum(left.values())
    exact = {file: max(rest, 0) * size / total for file, size in left.items()}
    shares = {file: least[file] + int(exact[file]) for file in sizes}
    by_remainder = sorted(sizes, key=lambda file: int(exact[file]) - exact[file])
    for file in by_remainder[: count - sum(shares.values())]:
        shares[file] += 1
    return shares


def places_of(file: str, source: str) -> list[Place]:
    """Return all places of a file."""
    lines, tree = source.splitlines(), get_ast(source)
    nodes = list(ast_nodes(tree))
    found: dict[tuple[tuple[int, int], tuple[int, int]], tuple[str, list[tuple[str, int]]]] = {}
    for name in operator_names():
        if LEFT_OUT.fullmatch(name):
            continue
        operator = get_operator(name)()
        at = ((node, span) for node in nodes for span in operator.mutation_positions(node))
        for occurrence, (node, span) in enumerate(at):
            _, changes = found.setdefault(span, (ASTQuery(node).get_definition_name() or "", []))
            changes.append((name, occurrence))
    return [
        Place(
            file=file,
            definition=definition,
            line=line,
            column=column,
            text=lines[line - 1].strip(),
            changes=tuple(changes),
        )
        for ((line, column), _), (definition, changes) in found.items()
    ]


def essence(source: str) -> str:
    """Return the parts of a module that affect its behaviour. Raises SyntaxError.

    It drops annotations, assertions, which only state what is true anyway, error messages, comments and
    layout.
    """
    return ast.dump(_Essence().visit(ast.parse(source)))


class _Essence(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        for child in ast.walk(node):
            if isinstance(child, ast.JoinedStr):
                child.values = []
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()


def _first(source: str, place: Place, seed: int) -> Iterator[Mutant]:
    """Yield the first mutant of a place, in seed order, that parses and can affect behaviour."""
    original = essence(source)
    for name, occurrence in sorted(place.changes, key=lambda change: _rank(seed, *place.where, change[0])):
        changed = mutate_code(source, get_operator(name)(), occurrence)
        try:
            if essence(changed) == original:
                continue
        except SyntaxError:
            continue
        difference = list(difflib.ndiff(source.splitlines(), changed.splitlines()))
        removed, added = (
            " ".join(word for line in difference if line.startswith(sign) for word in line[2:].split())
            for sign in ("- ", "+ ")
        )
        yield Mutant(
            file=place.file,
            definition=place.definition,
            line=place.line,
            source=changed,
            removed=removed,
            added=added,
        )
        return


def _rank(seed: int, *what: object) -> bytes:
    return hashlib.sha256(repr((seed, *what)).encode()).digest()
