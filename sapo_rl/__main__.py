"""The commands: `sapo-train`, also as `python -m sapo_rl`, and those that begin with `sapo-` like it.

Ctrl-C, or a reader of the output that goes away, ends them quietly.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from sapo_rl import processes
from sapo_rl.processes import streams


def main(module: str = "run.cli", program: str = "sapo-train") -> None:
    """Entry point of the console script `sapo-train`; others name their module in `sapo_rl` and themselves."""
    streams.prepare()
    try:
        os.getcwd()
    except FileNotFoundError:
        print(f"{program}: the current folder does not exist any more; change to another", file=sys.stderr)
        sys.exit(2)
    try:
        if "RANK" in os.environ:  # of a launcher that the user called, whose process id is not known
            processes.die_with_parent()
        # Here: Ctrl-C may come before the imports are done.
        try:
            code = importlib.import_module(f"sapo_rl.{module}").main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        sys.exit(128 + signal.SIGPIPE)
    if code:
        sys.exit(code)


def evaluate() -> None:
    """Entry point of the console script `sapo-eval`."""
    main("run.eval", "sapo-eval")


def export() -> None:
    """Entry point of the console script `sapo-export`."""
    main("run.export", "sapo-export")


def report() -> None:
    """Entry point of the console script `sapo-report`."""
    main("telemetry.report.cli", "sapo-report")


def explain() -> None:
    """Entry point of the console script `sapo-explain`."""
    main("losses.explain", "sapo-explain")


def serve() -> None:
    """Entry point of the console script `sapo-serve`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the imports take their time; then vLLM's server decides
    from sapo_rl.run.serve import main as command_line

    command_line()


if __name__ == "__main__":
    main()
