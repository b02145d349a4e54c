"""Which options a class or a module of BasicSR reads, found in its source.

BasicSR declares its options nowhere. Its code looks them up where it needs them, and forks look up more.
"""

import functools
import inspect
import re

# x["name"], x.get("name"), x.pop("name"), "name" in opt
_LOOKUP = r"""(?:\[|\.get\(|\.pop\()["'](\w+)["']|["'](\w+)["'] (?:not )?in [\w.]*opt\b"""


@functools.cache
def source_of(thing: object) -> str:
    """Return the source of a class, function or module; an empty string if Python cannot find it."""
    try:
        return inspect.getsource(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""


def names_in(*things: object) -> set[str]:
    """Return all names that classes, functions and modules look up in mappings."""
    found = (match for thing in things for match in re.findall(_LOOKUP, source_of(thing)))
    return {subscript or tested for subscript, tested in found}
