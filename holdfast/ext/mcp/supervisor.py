"""Runs an MCP server's command, and kills its whole process group when the worker dies for any reason.

    python supervisor.py PARENT_PID COMMAND…

A launcher (`uv run`, `npx`) may start the server, so killing the direct child would not be enough. The worker's client
created the process group for this process. Linux only; on other systems the server must exit at the end of its input.
"""

import ctypes
import os
import signal
import subprocess
import sys
from typing import NoReturn


def kill_group(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)


def main(parent: int, command: list[str]) -> NoReturn:
    signal.signal(signal.SIGUSR1, kill_group)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the worker died before the call above
            sys.exit(1)
    try:
        # Stdin and stdout belong to the server: this process neither reads nor writes them.
        server = subprocess.Popen(command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)
    code = server.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
