"""--prelude: functions of one's own that the policy's code can call.

The file's code is trusted, and runs inside the sandbox all the same: before the inputs are bound,
and again after a restart. The prompt names its functions and classes, each with the first line of
its docstring. Names that begin with an underscore are not named.
"""

import ast
import functools
from pathlib import Path

from data import DataError

DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


@functools.cache  # a file is read once: all trajectories of a run get the same functions
def read_prelude(path: str) -> str:
    """The code of the file; "" without a path. Raises DataError where it defines nothing."""
    if not path:
        return ""
    try:
        code = Path(path).read_text(encoding="utf-8-sig")
        compile(code, path, "exec", dont_inherit=True)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"--prelude {path:.90}: not a file of Python: {error!s:.150}") from None
    if not definitions(code):
        raise DataError(
            f"--prelude {path:.90}: it defines no function or class for the policy's code to call"
        )
    return code


def definitions(code: str) -> list:
    """The functions and classes at a file's top level."""
    body = ast.parse(code).body
    found = [node for node in body if isinstance(node, DEFINITIONS)]
    return [node for node in found if not node.name.startswith("_")]


def named_in_prompt(path: str) -> str:
    """What the prompt says of the file's functions; "" without a path. Raises DataError."""
    lines = []
    for node in definitions(read_prelude(path)):
        arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
        documented = ast.get_docstring(node) or ""
        purpose = documented.partition("\n")[0]
        lines.append(f"\n{node.name}{arguments}" + f": {purpose}" * bool(purpose))
    return "\nThe session also holds:" + "".join(lines) if lines else ""
