"""The process in which reward functions run: `python -m sapo_rl.rewards.worker <socket> <parent's process id>`.

It is handed its functions once, then answers one call after the other until the other end closes. The parent sends
pickles; an answer is a line of JSON with the number of its call, so that code which evaluates a model's words here
cannot make the parent run any, and what a function writes to descriptors that are not its own is no answer.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from sapo_rl.errors import UserError
from sapo_rl.processes import die_with_parent, guard_group
from sapo_rl.rewards.lookup import resolve
from sapo_rl.rewards.registry import PACKAGES, RewardFunction
from sapo_rl.rewards.scoring import ScoreError, evaluate, needed_columns

_OWN = os.getpid()


def main() -> None:
    """Serve until the parent closes the connection or dies."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    guard_group(parent, descriptor)
    connection = Connection(descriptor)
    try:
        _serve(connection)
    except EOFError:
        return
    except OSError:  # a function has closed or replaced the descriptor
        sys.exit(os.EX_PROTOCOL)


def _serve(connection: Connection) -> None:
    functions: dict[str, tuple[RewardFunction, dict[str, Any]]] = {}
    try:
        for name, (path, settings) in connection.recv().items():
            if path in PACKAGES:
                importlib.import_module(PACKAGES[path][0])  # now, for a sample's time limit must not pay for it
            functions[name] = resolve(path), settings
    except (UserError, ImportError) as error:
        _reply(connection, 0, failed=str(error))
        return
    _reply(connection, 0, needs={name: needed_columns(*function) for name, function in functions.items()})
    while True:
        call, name, arguments = connection.recv()
        function, settings = functions[name]
        try:
            _reply(connection, call, scores=evaluate(function, arguments, settings))
        except ScoreError as error:
            _reply(connection, call, failed=str(error))


def _reply(connection: Connection, call: int, **answer: Any) -> None:
    if os.getpid() != _OWN:  # a function has forked, and both return
        os._exit(0)
    with open(connection.fileno(), "wb", closefd=False) as stream:
        stream.write(json.dumps({"call": call, **answer}).encode() + b"\n")


if __name__ == "__main__":
    main()
