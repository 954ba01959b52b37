"""`vllm serve` without the rest of vLLM's command line, which asks for a version that the CPU's package does not have.

Arguments are those of `vllm serve`, the model as `--model`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from types import FrameType, ModuleType
from typing import Any

import psutil

from sapo_rl.processes import die_with_parent, scratch

# vLLM's core and its workers, which are spawned and so import this too, would outlive a server that is killed.
if __name__ == "__mp_main__":
    die_with_parent()


def main() -> None:
    """Serve until stopped. A signal that comes before vLLM serves ends it at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    with scratch.temporary_folder() as folder:
        os.environ.update(scratch.variables(folder, os.environ))
        tempfile.tempdir = None  # read the variable again
        _serve()


def _serve() -> None:
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Until it serves, vLLM would turn SIGTERM into an exception, which is lost in some places and printed in others.
    serve.run_server.__globals__["signal"] = _Deaf("signal")  # pyright: ignore[reportPrivateImportUsage]
    parser = FlexibleArgumentParser(prog="sapo-serve")
    (command,) = serve.cmd_init()
    arguments = command.subparser_init(parser.add_subparsers()).parse_args()
    assert arguments is not None
    command.validate(arguments)
    command.cmd(arguments)


def stop(number: int, frame: FrameType | None) -> None:
    """End this process by the signal, as if it had no handler, and its children with it.

    Those that are too young to die with their parent have no handler yet; multiprocessing's tracker stays to clean up.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.terminate()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class _Deaf(ModuleType):
    """The module `signal` for code that must not handle signals."""

    def __getattr__(self, name: str) -> Any:
        return getattr(signal, name)

    def signal(self, number: int, handler: Any) -> None:
        """Leave the handler as it is."""


if __name__ == "__main__":
    main()
