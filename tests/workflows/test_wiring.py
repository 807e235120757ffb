"""A workflow reads the result of an activity as the type that the activity returns.

Temporal does not compare the two. Where they differ, the workflow task fails at that result and is tried again for
ever: the run stands still, and not even a cancel gets through.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def trees(folder: str) -> Iterator[ast.Module]:
    return (ast.parse(path.read_text()) for path in sorted((ROOT / folder).glob("*.py")))


def returned() -> dict[str, str]:
    """By the activity's name: what it is annotated to return."""
    found: dict[str, str] = {}
    for tree in trees("activities"):
        for node in ast.walk(tree):
            if isinstance(node, ast.AsyncFunctionDef) and node.returns:
                for each in node.decorator_list:
                    if isinstance(each, ast.Call) and ast.unparse(each.func) == "activity.defn":
                        name = next(word.value for word in each.keywords if word.arg == "name")
                        found[ast.literal_eval(name)] = ast.unparse(node.returns)
    return found


def read(names: set[str]) -> Iterator[tuple[str, str]]:
    """Each call of an activity by its name in the workflows, and the type that its result is read as."""
    for tree in trees("workflows"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            first, runs = node.args[0], node.func.attr in ("run", "execute_activity")
            if runs and isinstance(first, ast.Constant) and (name := str(first.value)) in names:
                given = [word.value for word in node.keywords if word.arg == "result_type"] or node.args[2:3]
                yield name, ast.unparse(given[0]).replace("type(None)", "None") if given else "nothing"


def test_every_result_is_read_as_what_the_activity_returns() -> None:
    returns = returned()
    reads = list(read(set(returns)))
    assert {"plan", "tool", "undo", "list_items", "record_end"} <= {name for name, _ in reads}
    assert [(name, kind, returns[name]) for name, kind in reads if kind != returns[name]] == []
