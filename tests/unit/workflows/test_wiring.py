"""Workflows refer to activities by their functions, so that types are checked and "find usages" works.

Temporal does not compare what an activity returns with what the workflow reads. Where they differ, the workflow task
fails at that result and is tried again for ever. The type checker compares them, but only for functions.
"""

from __future__ import annotations

import ast

from holdfast.files import ROOT


def test_no_workflow_names_an_activity_by_a_string() -> None:
    named, by_function = [], set()
    for path in sorted((ROOT / "workflows").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first, runs = node.args[0], node.func.attr == "run" or "execute_activity" in node.func.attr
                if runs and isinstance(first, ast.Constant):
                    named.append(f"{path.name}:{node.lineno}")
                if runs and isinstance(first, ast.Attribute):
                    by_function.add(ast.unparse(first))
    assert named == []
    assert {"Plan.plan", "Tools.tool", "Tools.undo", "Batches.list_items", "RunRecords.record_end"} <= by_function
