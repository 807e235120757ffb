"""Code in the docs is code that runs: a block that names a file stands in it, but for its indentation."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"<!-- (\S+\.py) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    (page, source, code)
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for source, code in BLOCK.findall(page.read_text())
]


@pytest.mark.parametrize(("page", "source", "code"), BLOCKS, ids=lambda value: getattr(value, "name", "block"))
def test_a_block_of_code_is_taken_from_a_file_that_runs(page: Path, source: str, code: str) -> None:
    def lines(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().splitlines())

    assert lines(code) in lines((ROOT / source).read_text()), f"{page.name}: not in {source}"
