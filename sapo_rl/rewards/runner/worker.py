"""The process in which reward functions run: `python -m sapo_rl.rewards.runner.worker FD`, with a lifeline as stdin.

It is handed its functions once, then answers calls until the other end closes: of coroutine functions many at once,
of others one after the other. The parent sends
pickles; an answer is a line of JSON with the number of its call, so that code which evaluates a model's words here
cannot make the parent run any, and what a function writes to descriptors that are not its own is no answer. A guardian
(`sapo_rl.processes.guardian`) stands between the two and ends what functions have started.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from sapo_rl.config.reward import VERL
from sapo_rl.errors import UserError
from sapo_rl.errors.own_code import LONGEST_FAILURE, shorten
from sapo_rl.processes.guarded import begin
from sapo_rl.processes.guardian import LOST
from sapo_rl.rewards.lookup import check_own_arguments, resolve
from sapo_rl.rewards.registry import COLUMNS, PACKAGES, PREPARATIONS, RewardFunction, is_coroutine
from sapo_rl.rewards.runner.coroutines import Coroutines
from sapo_rl.rewards.runner.scoring import ScoreError, evaluate, needed_columns
from sapo_rl.rewards.verl import with_lists


def main() -> None:
    """Serve until the parent closes the connection or dies."""
    connection = Connection(begin())
    try:
        _serve(connection, partial(_reply, connection, os.getpid()))
    except (EOFError, OSError):  # by the parent, which asks no more, or by a function
        signal.raise_signal(LOST)


def _serve(connection: Connection, reply: Callable[..., None]) -> None:
    functions: dict[str, tuple[RewardFunction, dict[str, Any]]] = {}
    needs: dict[str, list[str]] = {}
    try:
        for name, (path, settings, style) in connection.recv().items():
            reply(0, loading=name)
            function = _load(name, path, settings, style)
            functions[name] = (with_lists(function, settings), {}) if style == VERL else (function, settings)
            needs[name] = needed_columns(*functions[name])
            if path in COLUMNS:
                needs[name] += COLUMNS[path](**settings)
    except UserError as error:
        reply(0, failed=shorten(str(error), LONGEST_FAILURE))
        return
    waiting = [name for name, (function, _) in functions.items() if is_coroutine(function)]
    reply(0, needs=needs, coroutines=waiting)
    coroutines = Coroutines(connection, reply, functions)
    while True:
        call, name, arguments = connection.recv()
        if name in waiting:
            coroutines.run(call, name, arguments)
        elif name:  # else a call is cancelled that has just ended
            function, settings = functions[name]
            try:
                reply(call, scores=evaluate(function, arguments, settings))
            except ScoreError as error:
                reply(call, failed=shorten(str(error), LONGEST_FAILURE))


def _load(name: str, path: str, settings: dict[str, Any], style: str) -> RewardFunction:
    """Import a function, and what a built-in needs: a sample's time limit must not pay for it."""
    if path in PACKAGES:
        try:
            importlib.import_module(PACKAGES[path][0])
        except ImportError as error:
            raise UserError(f"reward function '{path}' cannot be loaded: {error}") from error
    function = resolve(path)
    if path in PREPARATIONS:
        PREPARATIONS[path](**settings)
    if "." in path:
        check_own_arguments(name, function, settings, style)
    return function


def _reply(connection: Connection, own: int, call: int, **answer: Any) -> None:
    if os.getpid() != own:  # a function has forked, and both return
        os._exit(0)
    with open(connection.fileno(), "wb", closefd=False) as stream:
        stream.write(json.dumps({"call": call, **answer}).encode() + b"\n")


if __name__ == "__main__":
    main()
