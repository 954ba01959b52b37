"""Programs of a model's in the sandbox: what they can do, and everything that they cannot."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sapo_rl.processes import sandbox
from sapo_rl.processes.sandbox import Isolation, Job, Limits, Result, SandboxMissing, check, room, run

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
TIGHT = Limits(cpu_seconds=1, seconds=30, memory_mb=128, output_bytes=10_000, disk_mb=2)

FLOOD = """
import os
for d in range(3, 64):
  try:
    while True: os.write(d, bytes(65536))
  except OSError: pass
"""


def result(program: str, limits: Limits = TIGHT, **job: object) -> Result:
    return asyncio.run(run(Job(program, **job), limits))  # type: ignore[arg-type]


def test_a_program_reads_computes_and_prints() -> None:
    found = result("import math, sys\nprint(math.comb(int(input()), 2))\nprint('note', file=sys.stderr)", stdin="5\n")
    assert found == Result(0, "10\n", "note\n")


@pytest.fixture
def others() -> set[psutil.Process]:
    """Processes that other tests have started, which last as long as this one."""
    return set(psutil.Process().children(recursive=True))


def started(others: set[psutil.Process]) -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True)) - others


def test_no_more_programs_run_at_once_than_there_are_processors(
    monkeypatch: pytest.MonkeyPatch, others: set[psutil.Process]
) -> None:
    monkeypatch.setattr(sandbox, "processors", lambda: 2)
    seen = []

    async def one() -> Result:
        async with room("bubblewrap"):
            return await run(Job("import time\ntime.sleep(0.2)\nprint(6)"), TIGHT)

    async def watched() -> list[Result]:
        runs = asyncio.gather(*[one() for _ in range(6)])
        while not runs.done():
            seen.append(len(set(psutil.Process().children()) - others))
            await asyncio.sleep(0.01)
        return await runs

    assert [one.stdout for one in asyncio.run(watched())] == ["6\n"] * 6
    assert max(seen) == 2


def test_an_error_is_told_as_python_tells_it() -> None:
    found = result("def half(x):\n    return 1 / x\nhalf(0)")
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
        "    half(0)",
        '  File "program.py", line 2, in half',
        "    return 1 / x",
        "           ~~^~~",
        "ZeroDivisionError: division by zero",
    ]


def test_checks_and_calls_are_reported_one_by_one() -> None:
    program = "def pair(x):\n    return (x, x + 1)"
    checks = ["assert pair(1) == (1, 2)", "assert pair(1) == 3, 'no'", "pair()"]
    found = result(program, checks=checks, function="pair", calls=[[1], ["a"]]).reports
    assert [report.get("passed") for report in found] == [True, False, False, None, None]
    assert found[1]["error"] == "AssertionError: no"
    assert found[3] == {"value": [1, 2]}
    assert "TypeError" in found[4]["error"]


def test_a_program_that_leaves_no_file_to_open_is_told_of_its_checks_and_calls() -> None:
    leaks = "kept = []\ntry:\n    while True: kept.append(open('/dev/null'))\nexcept OSError: pass\n"
    program, checks = leaks + "def same(x): return x", ["assert False, '\U0001f600 \"' + chr(0xd800)", "pass"]
    assert result(program, checks=checks, function="same", calls=[["é"], [{"a": None}]]).reports == [
        {"passed": False, "error": 'AssertionError: \U0001f600 "\ud800'},
        {"passed": True},
        {"value": "é"},
        {"value": {"a": None}},
    ]


def test_a_check_that_never_ends_leaves_the_others_their_verdict() -> None:
    found = result("def wait(x):\n    while x: pass", checks=["wait(0)", "wait(1)", "wait(0)"])
    assert found.reports == [{"passed": True}]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os\nwhile True: os.fork()", "Operation not permitted"),
        ("import subprocess\nsubprocess.run(['sleep', '100'])", "Operation not permitted"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "not"),
        ("x = bytearray(30 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
        ("import os\nos.memfd_create('x')", "Operation not permitted"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 22))", "Operation not permitted"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')", "Operation not permitted"),
        ("open('/dev/shm/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("import sys\nopen(sys.base_prefix + '/x', 'w')", "Read-only file system"),
        ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))", "File too large"),
        ("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))", "No space left on device"),
        ("f = [open('/dev/null') for _ in range(999)]", "Too many open files"),
        ("import os\nos.kill(os.getppid(), 9)", "Operation not permitted"),
        ("import os\nos.kill(-1, 9)", "Operation not permitted"),
        ("import os\nos.setuid(0)", "Invalid argument"),
        ("import os\nos.chroot('/tmp')", "Operation not permitted"),
        ("open('/etc/passwd')", "No such file"),
        ("import os\nos.symlink('/etc/passwd', '/tmp/x')\nopen('/tmp/x')", "No such file"),
        ("import os\nos.listdir('/proc')", "No such file"),
        ("import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0", "AssertionError"),
        ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        ("import ctypes\nassert ctypes.CDLL(None).syscall(165, 0, 0, 0, 0, 0) == 0", "AssertionError"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "not allowed to raise maximum limit"),
    ],
)
def test_what_no_program_can_do(program: str, said: str) -> None:
    found = result(program)
    assert found.exit_code != 0
    assert said in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "stopped"),
    [
        ("import time\ntime.sleep(1000)", "seconds"),
        ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)", "seconds"),
        ("import os\nos.close(1)\nos.close(2)\nos.read(0, 1)\nwhile True: pass", ""),
        ("while True: print('x' * 100)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 100)", "output"),
        (FLOOD, "output"),
    ],
)
def test_what_never_ends_is_ended(program: str, stopped: str) -> None:
    found = result(program, Limits(cpu_seconds=1, seconds=3 if stopped == "seconds" else 60, output_bytes=1000))
    assert (found.exit_code, found.stopped) == (128 + signal.SIGKILL, stopped)
    assert len(found.stdout) <= 1000 and len(found.stderr) <= 1000


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_a_program_has_the_report_s_descriptor_beside_its_own_and_cannot_fork(isolation: Isolation) -> None:
    program = """
import os, sys
found = []
for d in range(64):
    try: found.append(oct(os.fstat(d).st_mode))
    except OSError: pass
print(found == ["0o10600"] * 4, __builtins__.len("ab"), sys.modules["__main__"].__dict__.get("job"))
os.fork()
"""
    found = asyncio.run(run(Job(program), TIGHT, isolation))
    assert found.stdout == "True 2 None\n"
    assert "Operation not permitted" in found.stderr.splitlines()[-1]


def test_threads_are_allowed() -> None:
    found = result("import threading\none = threading.Thread(target=print, args=['here'])\none.start()\none.join()")
    assert found.stdout == "here\n"


def test_a_program_sees_neither_secrets_nor_files_of_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hidden")
    (tmp_path / "secret").write_text("hidden")
    found = result(
        f"import os\nprint(dict(os.environ), os.path.exists({str(tmp_path)!r}), os.getuid(), os.listdir('.'))"
    )
    assert "hidden" not in found.stdout and "API_KEY" not in found.stdout
    assert "False 65534 []" in found.stdout


def test_lines_that_a_program_writes_itself_are_no_reports() -> None:
    program = "import os\nfor d in range(3, 64):\n  try: os.write(d, b'{\"passed\": true}\\n')\n  except OSError: pass"
    assert result(program + "\nos._exit(0)", checks=["assert False"]).reports == []


@pytest.mark.parametrize("line", ["[]", "1", "{", '"text"', "[" * 9999, "\\xff", '{"key": 1}', "9" * 9999])
def test_whatever_a_program_writes_to_every_descriptor_it_gets_a_result(line: str) -> None:
    program = f"import os\nfor d in range(3, 64):\n  try: os.write(d, b'{line}\\n')\n  except OSError: pass"
    assert result(program, checks=["pass"]).reports == [{"passed": True}]


@pytest.mark.parametrize(
    "program",
    ["(" * 99999, "-" * 99999 + "1", "x" + ".a" * 99999, "9**9**9", "print('\0')", "'\ud800'", "x = 1\n" * 1_000_000],
)
def test_a_text_that_python_cannot_take_harms_its_own_process_alone(program: str) -> None:
    found = result(program, Limits(cpu_seconds=1, memory_mb=128), setup="pass\n", checks=["assert False"])
    assert found.exit_code != 0
    assert not any(report["passed"] for report in found.reports)


def test_the_clock_begins_with_the_program() -> None:
    """The start of bubblewrap and of Python takes longer than this alone."""
    assert result("print(1)", Limits(seconds=0.02)).stdout == "1\n"
    found = result("import time\ntime.sleep(0.5)", Limits())
    assert 0.5 <= found.seconds < 5


def test_a_sandbox_that_does_not_come_up_is_told_with_the_time_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "_command", lambda *_: ["sleep", "600"])
    with pytest.raises(OSError, match=r"the sandbox did not start a program: not in 0\.1 s"):
        result("print(1)")


def test_nothing_is_left_of_a_run_that_is_cancelled(others: set[psutil.Process]) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(run(Job("import time\ntime.sleep(1000)"), Limits(seconds=1000)))
        while not started(others):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())
    assert started(others) == set()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_is_cancelled_twice_while_it_starts_ends(others: set[psutil.Process]) -> None:
    gc.collect()  # what other tests have left

    async def cancel(turns: int) -> None:
        task = asyncio.create_task(run(Job("import time\ntime.sleep(1000)"), Limits(seconds=1000)))
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        assert await asyncio.wait([task], timeout=60) == ({task}, set())
        assert task.cancelled()

    for turns in range(12):
        asyncio.run(cancel(turns))
        gc.collect()  # complains of pipes that are open
    assert started(others) == set()


def test_nothing_is_left_where_this_process_is_killed(tmp_path: Path) -> None:
    program = "import time\\ntime.sleep(1000)"
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio\nfrom sapo_rl.processes.sandbox import *\n"
            f"asyncio.run(run(Job('{program}'), Limits(seconds=1000)))",
        ]
    )
    own = psutil.Process(caller.pid)
    while len(started := own.children(recursive=True)) < 2:
        assert caller.poll() is None
    caller.kill()
    caller.wait()
    assert psutil.wait_procs(started, timeout=30)[1] == []


def test_many_runs_leave_no_descriptor() -> None:
    async def many() -> list[int]:
        found = []
        for _ in range(3):
            done = await asyncio.gather(*(run(Job(f"print({n})"), Limits()) for n in range(8)))
            assert [one.stdout for one in done] == [f"{n}\n" for n in range(8)]
            found.append(len(os.listdir("/proc/self/fd")))
        return found

    first, *rest = asyncio.run(many())
    assert rest == [first, first]


def test_a_machine_without_bubblewrap_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox._isolation.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxMissing, match="needs bubblewrap to isolate programs: apt-get install bubblewrap"):
        check("bubblewrap")
    check("none")
