"""Reward functions of a Python session: those of a notebook's cell, or of the script itself, that no worker can import.

They run in the session, in threads; the workers of the run that it has started call them over a socket of their own,
in JSON. A call cannot be ended from outside: one that hangs holds up the session, not the run, which gives it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socketserver
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from sapo_rl.errors import UserError
from sapo_rl.processes.scratch import temporary_folder
from sapo_rl.rewards.registry import RewardFunction, Score, is_coroutine
from sapo_rl.rewards.runner.scoring import ScoreError, evaluate, evaluate_coroutine

VARIABLE = "SAPO_SESSION"
"""Holds the path of the session's socket, for workers."""
LONGEST_LINE = 1 << 26
"""Bytes of a call or an answer."""
LONGEST_ADDRESS = 107
"""Bytes of a socket's path, by the kernel."""
GONE = (
    "the function is one of the Python session that started the run, which is gone; go on from Python, with "
    "train(resume=..., rewards=[...])"
)


def call(*, session_function: str, **arguments: list[Any]) -> list[Score]:
    """Have the session call one of its functions, in a worker.

    Args:
        session_function: its name.
        arguments: what a reward function is given, by name.

    Raises:
        ScoreError: it has failed, or the session is gone.
    """
    return asyncio.run(call_coroutine(session_function=session_function, **arguments))


async def call_coroutine(*, session_function: str, **arguments: list[Any]) -> list[Score]:
    """Do as `call` does, of a coroutine function: many calls may be under way at once.

    Raises:
        ScoreError: as `call`.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(os.environ[VARIABLE], limit=LONGEST_LINE)
        try:
            writer.write(_line([session_function, arguments]))
            return _scores(await reader.readline())
        finally:
            writer.close()
    except (OSError, KeyError) as error:
        raise ScoreError(GONE) from error


def path_to(function: RewardFunction) -> str:
    """Return the dotted path under which a worker finds what calls this function of a session."""
    return f"{__name__}.{(call_coroutine if is_coroutine(function) else call).__name__}"


def is_path(path: str) -> bool:
    """Return whether a dotted path is one that `path_to` returns."""
    return path in (f"{__name__}.{call.__name__}", f"{__name__}.{call_coroutine.__name__}")


class SessionFunctions:
    """Answers the calls of workers to functions of this process; a context manager.

    Functions are called one at a time, coroutine functions side by side.

    Args:
        functions: by name.

    Example:
        >>> with SessionFunctions({"short": lambda completions: [-len(text) for text in completions]}) as variables:
        ...     subprocess.run(command, env={**os.environ, **variables})
    """

    def __init__(self, functions: Mapping[str, RewardFunction]) -> None:
        self._functions = dict(functions)
        self._turn = threading.Lock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> dict[str, str]:
        """Listen from now on; return the environment variables that tell workers where."""
        if not self._functions:
            return {}
        with contextlib.ExitStack() as stack:
            address = str(stack.enter_context(temporary_folder()) / "session")  # readable by its owner alone
            if len(os.fsencode(address)) > LONGEST_ADDRESS:
                raise UserError(
                    f"TMPDIR: '{address}' has more than {LONGEST_ADDRESS} bytes, too many for a socket's path; set "
                    "it to a shorter folder, e.g. /tmp"
                )
            server = stack.enter_context(_Server(address, self._answer))
            stack.callback(server.shutdown)
            # Always the same, so that clients which coroutine functions keep stay usable.
            self._loop = asyncio.new_event_loop()
            stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
            threading.Thread(target=server.serve_forever, args=(0.05,), name="rewards", daemon=True).start()
            threading.Thread(target=self._run_coroutines, name="coroutine rewards", daemon=True).start()
            self._stack = stack.pop_all()
        return {VARIABLE: address}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no more calls."""
        self._stack.close()

    def _run_coroutines(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _answer(self, request: bytes) -> bytes:
        name, arguments = json.loads(request)
        function = self._functions.get(name)
        if function is None:
            return _line({"failed": f"the session has no reward function '{name}'"})
        try:
            if is_coroutine(function):
                made = asyncio.run_coroutine_threadsafe(evaluate_coroutine(function, arguments, {}), self._loop)
                return _line({"scores": made.result()})
            with self._turn:
                return _line({"scores": evaluate(function, arguments, {})})
        except ScoreError as error:
            return _line({"failed": str(error)})


class _Server(socketserver.ThreadingUnixStreamServer):
    """Answers one line on each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: str, answer: Any) -> None:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                if request := self.rfile.readline(LONGEST_LINE):
                    self.wfile.write(answer(request))

            def finish(self) -> None:
                with contextlib.suppress(OSError):  # the worker has given the call up
                    super().finish()

        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a worker that has gone away needs no answer."""


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _scores(line: bytes) -> list[Score]:
    if not line:
        raise ScoreError(GONE)
    answer = json.loads(line)
    if "failed" in answer:
        raise ScoreError(answer["failed"])
    return answer["scores"]
