"""Runs an MCP server's command and takes its whole process group along when the worker dies, however it dies.

    python minder.py PARENT_PID COMMAND…

A server may stand behind a launcher (`uv run`, `npx`), so killing our direct child would not be enough. The group is
the one that the worker's client made for this process. Linux only; elsewhere a server has to heed the end of its input.
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
        if os.getppid() != parent:  # it died before the call above
            sys.exit(1)
    try:
        # Stdin and stdout are the server's: this process neither reads nor writes them.
        server = subprocess.Popen(command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)
    code = server.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
