"""A program in the sandbox of a service, by the interface of SandboxFusion: `POST /run_code`.

What is sent is Python's source: `inside.py`, which limits itself, and the job, with which it runs the program and what
is asked of it. Its reports come among what the program prints, each on a line with a key, and are taken out of it.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from sapo_rl.processes.posting import (
    AnswerTooLong,
    ServerError,
    TryAgain,
    check_url,
    client,
    excerpt,
    is_variable,
    key_in,
    lasting,
    post,
)
from sapo_rl.processes.sandbox import inside
from sapo_rl.processes.sandbox.job import Job, Limits, Result, SandboxMissing, by_key, task_of

_WAIT_SECONDS = 60.0  # for a service that has others to serve first, beside the program's own time
_KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Service:
    r"""Runs programs elsewhere.

    Example:
        >>> await Service("http://127.0.0.1:8080").run(Job("print(6 * 7)"), Limits())
        Result(exit_code=0, stdout='42\n', stderr='', ...)
    """

    url: str
    """Of the service; `/run_code` at its end may be left out."""
    key: str | None = None
    """The environment variable with its key, which is sent as a bearer token."""
    retries: int = 3
    """How often a program is sent again where the service fails, after growing pauses."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Service:
        """Return the service with these settings.

        Raises:
            SandboxMissing: settings that cannot be.
        """
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                raise SandboxMissing(f"sandbox.{name}: unknown; valid: {', '.join(names)}")
        made = cls(**{"url": "", **settings})
        try:
            check_url(made.url)
        except ValueError as error:
            raise SandboxMissing(f"sandbox.{error}") from error
        if not is_variable(made.key):
            raise SandboxMissing("sandbox.key must be the name of an environment variable")
        if type(made.retries) is not int or made.retries < 0:
            raise SandboxMissing(f"sandbox.retries is {made.retries}, must be a whole number of at least 0")
        return made

    async def run(self, job: Job, limits: Limits) -> Result:
        """Have a program run and return how it ended.

        Raises:
            SandboxMissing: this process does not see the key.
            ServerError: the service did not run it, which is no fault of the program.
        """
        try:
            secret = key_in(self.key)
        except ValueError as error:
            raise SandboxMissing(str(error)) from error
        key = secrets.token_hex(16)  # lines that a program writes without having looked for it are no reports
        body = {
            "language": "python",
            "code": _code(task_of(job, limits, key)),
            "stdin": job.stdin.encode(errors="replace").decode(),
            "compile_timeout": limits.seconds,
            "run_timeout": limits.seconds,
            "memory_limit_MB": limits.memory_mb,
        }
        url, read = f"{self.url.rstrip('/').removesuffix('/run_code')}/run_code", _Reading(limits, key)
        session = await lasting((self.url, self.key), lambda: client(url, secret, _WAIT_SECONDS))
        seconds = limits.seconds + _WAIT_SECONDS
        try:
            return await post(session, url, json.dumps(body).encode(), read.result, self.retries, seconds=seconds)
        except AnswerTooLong:  # nothing but what the program printed is that long
            return Result(_KILLED, "", "", "output")


@cache
def run_a_probe(service: Service) -> None:
    """Have a service run a small program, once in a process, whatever event loop is running.

    Raises:
        SandboxMissing: it does not; the message says why.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(asyncio.run, service.run(Job("print(6 * 7)"), Limits())).result()
    except ServerError as error:
        raise SandboxMissing(f"the sandbox's service runs no program: {error}") from error
    if found.stdout != "42\n":
        told = excerpt(found.stderr or found.stdout)
        raise SandboxMissing(f"the sandbox's service at {service.url} ran print(6 * 7) and answered: {told!r}")


@dataclass(frozen=True)
class _Reading:
    """Makes a result of what a service answers, of which nothing can be taken for granted."""

    limits: Limits
    key: str

    def result(self, said: str) -> Result:
        try:
            answer = json.loads(said)
            status, ran = answer["status"], answer["run_result"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ServerError(f"the service's answer is none of SandboxFusion's: {excerpt(said)}") from error
        ended = ran.get("status") if isinstance(ran, dict) else None
        if status == "SandboxError" or ended not in ("Finished", "TimeLimitExceeded"):
            raise TryAgain(f"the service says that its sandbox failed: {excerpt(said)}")
        late, code = ended == "TimeLimitExceeded", ran.get("return_code")
        stdout, reports = self._parted(_text(ran.get("stdout")))
        if not reports or (not late and type(code) is not int):  # its time ran out before the first line: it waited
            raise TryAgain(f"the service did not run the program: {excerpt(said)}")
        if late or type(code) is not int:
            code = _KILLED
        most, stderr = self.limits.output_bytes, _text(ran.get("stderr"))
        long = len(stdout) > most or len(stderr) > most
        seconds = ran.get("execution_time")
        return Result(
            code if code >= 0 else 128 - code,
            stdout[:most],
            stderr[:most],
            "seconds" if late else "output" if long else "",
            reports[1:],
            float(seconds) if isinstance(seconds, int | float) else 0.0,
        )

    def _parted(self, printed: str) -> tuple[str, list[dict[str, Any]]]:
        """What the program printed, and what was reported."""
        line = re.compile(rf'\n(\{{"key": "{self.key}".*\}})\n')
        return line.sub("", printed), by_key([one.encode() for one in line.findall(printed)], self.key)


def _text(found: Any) -> str:
    return found if isinstance(found, str) else ""


def _code(task: Mapping[str, Any]) -> str:
    """The program that a service runs; ASCII alone."""
    return (
        "import json\n"
        'names = {"__name__": "sandbox"}\n'
        f"exec(compile({_source()!a}, 'sandbox.py', 'exec'), names)\n"
        f"names['serve'](json.loads({json.dumps(task)!a}))\n"
    )


@cache
def _source() -> str:
    return Path(inside.__file__).read_text(encoding="utf-8")
