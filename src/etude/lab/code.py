"""A digest of what the code does, so that runs made by other code are not taken for runs of this one."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from pathlib import Path

import etude

UNSEEN = ("app", "lab")  # nothing here decides what a run does


@cache
def code_digest(method: str) -> str:
    """Of every shared stage and of the module `method` (a dotted name). Comments, docstrings and layout do not
    count, nor do the method's claims, whose runs are known by their own options."""
    root = Path(etude.__file__).parent
    own = root.joinpath(*method.split(".")[1:]).with_suffix(".py")
    shared = [p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in (*UNSEEN, "methods")]
    composing = (root / "methods").glob("*.py")
    return _digest(root, [*shared, *composing, own])


def _digest(root: Path, files: Iterable[Path]) -> str:
    digest = blake2b(digest_size=8)
    for file in sorted(set(files)):
        digest.update(f"{file.relative_to(root).as_posix()}\n{_bare(ast.parse(file.read_bytes()))}\n".encode())
    return digest.hexdigest()


def _bare(tree: ast.Module) -> str:
    tree.body = [node for node in tree.body if not _claims(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _claims(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("Claim(", "Method("))
