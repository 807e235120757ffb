import os
import sys

# Some images forbid bytecode. A suite that starts a thousand Python processes would spend half its time compiling.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

pytest_plugins = ["tests.fixtures.store", "tests.fixtures.temporal", "tests.fixtures.stack", "tests.fixtures.checkout"]
