"""Runs a worker: `uv run worker.py [--queue STAGE]`.

A tool may name a stage, which is a separate task queue. Without `--queue`, the worker serves the main queue and every
stage; with `--queue extract`, only that stage; with `--queue main`, everything but the stages.

The connection comes from the standard Temporal profile and `TEMPORAL_*`. On SIGTERM or SIGINT the worker drains: it
takes no new tasks and gives those in flight `HOLDFAST_DRAIN_S` seconds to finish; another worker does the rest.
Exit status: 0 after a drain, 1 when the worker fails or the drain exceeds its limit, 2 when it cannot start.
"""

from __future__ import annotations

import argparse
import sys

import uvloop
from temporalio.service import RPCError

from holdfast.authoring import registry
from holdfast.authoring.places import missing_folders
from holdfast.cli.ending import end_process
from holdfast.cli.errors import mendable
from holdfast.engine.client import NoServer
from holdfast.engine.worker import MAIN, NotReady, chosen
from holdfast.reliability import crash_points
from holdfast.settings import unfit
from holdfast.state.database import StoreUnavailable, one_line
from holdfast.state.version import SchemaMismatch


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a worker of the agent platform.")
    try:
        stages = ", ".join(registry.stages())
        parser.add_argument(
            "--queue",
            metavar="STAGE",
            help=f"serve only one stage ({stages}), or `{MAIN}` for all but the stages; default: everything."
            " The task queues are HOLDFAST_TASK_QUEUE and, for a stage, HOLDFAST_TASK_QUEUE.STAGE",
        )
        queue = parser.parse_args().queue
        if wrong := missing_folders():
            raise NotReady("; ".join(wrong))
        crash_points.arm_from_environment()
        from workflows.serving import serve  # imports LangGraph, which `--help` and a refused option do not need

        return uvloop.run(serve(chosen(queue)))
    except RPCError as error:
        said = f"the Temporal server answered {error.status.name.lower()}: {error.message}"
        print(f"worker cannot start: {said}; see `uv run starter.py doctor`", file=sys.stderr)
        return 2
    except (NoServer, NotReady, SchemaMismatch, StoreUnavailable, registry.BrokenAgent, ValueError) as error:
        print(f"worker cannot start: {unfit(error) or one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if (words := mendable(error)) is None:
            raise
        print(f"worker cannot start: {words}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main())
