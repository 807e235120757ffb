"""What a clone gets."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_clone_gets_no_link_that_leads_out_of_it():
    # A `.venv` that was linked for one machine replaces the real one on another, with all that is installed in it.
    tracked = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in tracked.splitlines() if line.startswith("120000 ")]
