"""The command line: `uv run starter.py --help`."""

from holdfast.cli.app import main
from holdfast.cli.ending import end_process

if __name__ == "__main__":
    end_process(main())
