"""Which options a class or a module of BasicSR reads, found in its source.

BasicSR declares its options nowhere: its code looks them up where it needs them, and forks look up more. So what an
option file may say is found by looking for these look-ups.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_OPTIONS = ("opt", "self.opt")  # what BasicSR calls all options, or those of a data set
_SECTIONS = {"train_opt": "train", "dataset_opt": "datasets"}  # its names for parts of them
_LOOKUPS = ("get", "pop", "setdefault")


@dataclass
class Reads:
    """How code uses options, by section; `""` is the top level.

    Attributes:
        names: options that are looked up.
        needed: options whose absence is an error.
        built: attributes that are built from options, by the option: `cri_pix` by `pixel_opt`.
        used: attributes that are read.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    needed: dict[str, set[str]] = field(default_factory=dict)
    built: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def mentions(things: Iterable[object], name: str) -> bool:
    """Return whether the source of one of the classes or modules looks up an option of that name."""
    return any(name in names for names in of(*things).names.values())


def of(*things: object) -> Reads:
    """Return what the sources of classes, functions and modules read; nothing for those without source."""
    joined = Reads()
    for thing in things:
        reads = _of(thing)
        for into, names in ((joined.names, reads.names), (joined.needed, reads.needed)):
            for section, found in names.items():
                into.setdefault(section, set()).update(found)
        joined.built = reads.built | joined.built  # the nearest class takes precedence
        joined.used |= reads.used
    return joined


@functools.cache
def _of(thing: object) -> Reads:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return Reads()
    reads = Reads()
    nodes = list(_walk(tree))
    sections = _note_assignments(reads, [node for node, _ in nodes])
    optional: set[str] = set()
    for node, certain in nodes:
        found = _lookup(node)
        if found:
            section, name = _section(found[0], sections), found[1]
            reads.names.setdefault(section, set()).add(name)
            if not isinstance(node, ast.Subscript):
                optional.add(name)
            elif certain:
                reads.needed.setdefault(section, set()).add(name)
    for names in reads.needed.values():
        names.difference_update(optional)
    for node, _ in nodes:
        if isinstance(node, ast.If):
            reads.needed.setdefault("train", set()).update(_unset(node, reads))
    return reads


def _note_assignments(reads: Reads, nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Record which attributes are built from options and used; return the names of variables for sections."""
    sections = dict(_SECTIONS)
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            reads.used.add(node.attr)
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, found = node.targets[0], _lookup(node.value)
            if isinstance(target, ast.Name) and found:  # train_opt = self.opt['train']
                sections.setdefault(target.id, found[1])
            elif isinstance(target, ast.Attribute):
                reads.built |= dict.fromkeys(_names_in(node.value), target.attr)
    return sections


def _walk(node: ast.AST, certain: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield nodes, and whether they always run when their function is called."""
    yield node, certain
    for name, value in ast.iter_fields(node):
        unsure = isinstance(node, ast.If | ast.IfExp | ast.Try | ast.While | ast.For) and name in ("body", "orelse")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, certain and not unsure)


def _unset(node: ast.If, reads: Reads) -> set[str]:
    """Return the losses without which a used attribute is undefined: `if opt.get('x_opt'): self.x = ...`."""
    asked = {name for name in _names_in(node.test) if name.endswith("_opt")}
    otherwise = {inner.attr for each in node.orelse for inner in ast.walk(each) if isinstance(inner, ast.Attribute)}
    attributes = {name: reads.built.get(name) for name in asked}
    return {name for name, made in attributes.items() if made in reads.used and made not in otherwise}


def _lookup(node: ast.AST) -> tuple[ast.expr, str] | None:
    """Return the mapping and the name of an option look-up: `x['name']`, `x.get('name')`, `'name' in x`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        where, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        if node.func.attr not in _LOOKUPS:
            return None
        where, key = node.func.value, node.args[0]
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        where, key = node.comparators[0], node.left
    else:
        return None
    return (where, key.value) if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _names_in(node: ast.AST) -> list[str]:
    return [found[1] for inner in ast.walk(node) if (found := _lookup(inner))]


def _section(where: ast.expr, sections: dict[str, str]) -> str:
    """Return the section that an expression refers to, or the text of the expression if the section is unknown."""
    text = ast.unparse(where)
    if text in _OPTIONS:
        return ""
    found = _lookup(where)
    return found[1] if found else sections.get(text, text)
