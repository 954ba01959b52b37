"""The pool with real workers and functions that misbehave in every way we know."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rewards.groups import group, rewards
from samples import one_row
from waiting import until

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.errors import UserError
from sapo_rl.rewards import RewardPool
from sapo_rl.types import Group, Prompt

pytestmark = pytest.mark.usefixtures("forked_workers")

MODULE = '''
import contextlib, math, os, signal, sys, time
from pathlib import Path

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def rank(completions, **columns):
    """Depends on the whole group."""
    return [float(sorted(completions).index(text)) for text in completions]

def moody(completions, **columns):
    Path(f"worker.{os.getpid()}").touch()
    for text in completions:
        if text == "raise":
            raise ValueError("no mood")
        if text == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        if text == "die":
            os._exit(76)
        if text == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "exit":
            sys.exit("bye")
    return [math.nan if text == "nan" else None if text == "none" else 1.0 for text in completions]

def judge(completions, solution, level=1, *, scale, **columns):
    return [scale for _ in completions]

def short(completions, **columns):
    return [1.0]

def forks(completions, **columns):
    child = os.fork() == 0
    return [99.0 if child else float(len(text)) for text in completions]

def everywhere(completions, **columns):
    """Writes what a text holds to all descriptors beyond stderr, or closes them."""
    for text in completions:
        for fd in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
            with contextlib.suppress(OSError):
                if text.startswith("write "):
                    os.write(fd, eval(text[6:]))
                if text == "close":
                    os.close(fd)
                if text == "replace":
                    os.dup2(os.open("mine.txt", os.O_RDWR | os.O_CREAT), fd)
    if "close" in completions:
        time.sleep(100)
    return [1.0 for _ in completions]

def drip(completions, **columns):
    while True:
        for fd in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
            with contextlib.suppress(OSError):
                os.write(fd, b"[" * 100)
        time.sleep(0.001)

def patches(completions, **columns):
    """Has the worker answer with the scores that a text holds."""
    import json
    for text in completions:
        if text.startswith("answer "):
            real, scores = json.dumps, eval(text[7:], {"nan": math.nan})
            json.dumps = lambda answer: real({**answer, "scores": scores})
    return [1.0 for _ in completions]

def once(completions, **columns):
    """Dies, or stops, at the first call in this folder that holds such a text, like one that is hit from outside."""
    for text in completions:
        if text in ("SIGKILL", "SIGTERM", "SIGSTOP") and not Path(text).exists():
            Path(text).touch()
            os.kill(os.getpid(), getattr(signal, text))
    return [float(len(completions)) for _ in completions]

def leaves(completions, **columns):
    """Starts processes in its own session, in one of theirs and without a parent."""
    import subprocess
    sleep = [sys.executable, "-c", "import os, time; open(f'worker.{os.getpid()}', 'w'); time.sleep(1000)"]
    subprocess.Popen(sleep)
    subprocess.Popen(sleep, start_new_session=True)
    subprocess.run(["sh", "-c", '"$@" & exit', "sh", *sleep], start_new_session=True)
    while len(list(Path.cwd().glob("worker.*"))) < 3:
        time.sleep(0.05)
    Path("left").touch()
    return moody(completions)

def secrets(completions, **columns):
    return [float(os.environ[text] == "value") for text in completions]

def chatty(completions, **columns):
    print("printed by chatty")
    print("and its stderr", file=sys.stderr)
    return [1.0 for _ in completions]

def notes(completions, **columns):
    Path("noted").touch()
    return [0.0 for _ in completions]

def compared(completions, prompts, answer, **columns):
    """Each sample's length less the longest; notes how many it is given. Fails where one of them is to."""
    with open("calls.txt", "a") as file:
        print(len(completions), file=file)
    texts = [text if isinstance(text, str) else " ".join(one["content"] for one in text) for text in completions]
    if "fail" in texts or len(set(map(len, [completions, prompts, answer]))) > 1:
        raise ValueError("cannot compare")
    return [float(len(text) - max(map(len, texts))) for text in texts]

def unsteady(completions, *, times, **columns):
    """Fails the first times that it is called on a text."""
    for text in completions:
        with open(f"tried.{text}", "a+") as file:
            file.write("x")
            file.seek(0)
            if len(file.read()) <= times:
                raise ConnectionError("no answer")
    return [2.0 for _ in completions]

def slow(completions, **columns):
    time.sleep(0.3 * len(completions))
    return [float(len(completions)) for _ in completions]
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool_rewards.py").write_text(MODULE)
    return tmp_path


def config(workers: int = 1, start_timeout: float = 120.0, env: tuple[str, ...] = (), **functions: Any) -> RewardConfig:
    chosen = {name: RewardFunctionConfig(**value) for name, value in functions.items()}
    return RewardConfig(chosen, workers, start_timeout, [*env])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def worker_pids(here: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in here.glob("worker.*")]


def test_several_functions_score_every_sample_by_name(here: Path) -> None:
    cfg = config(
        workers=2,
        exact={"function": "exact_match"},
        loose={"function": "exact_match", "args": {"ignore_case": True}},
        rank={"function": "pool_rewards.rank"},
    )
    groups = [group(0, ["b", "a", "B"], answer="b"), group(1, ["x", "y"], answer="y"), group(2, ["q"], answer=None)]
    with RewardPool(cfg) as pool:
        groups, stats = pool.score(groups)
        assert rewards(groups, "exact") == [[1.0, 0.0, 0.0], [0.0, 1.0], [None]]
        assert rewards(groups, "loose") == [[1.0, 0.0, 1.0], [0.0, 1.0], [None]]
        assert rewards(groups, "rank") == [[2.0, 1.0, 0.0], [0.0, 1.0], [0.0]]
        assert stats.errors == {"exact": 0, "loose": 0, "rank": 0}
        assert stats.not_applicable == {"exact": 1, "loose": 1, "rank": 0}
        assert stats.failures == {}
        again = [group(3, ["zzz"], answer="zzz")]
        again, _ = pool.score(again)
        assert rewards(again, "exact") == [[1.0]]


def test_groups_are_scored_while_others_are_still_written(here: Path) -> None:
    early, late = group(0, ["b", "a"], answer="b"), group(1, ["x", "y"], answer="y")
    functions = {"exact": {"function": "exact_match"}, "notes": {"function": "pool_rewards.notes"}}
    with RewardPool(config(**functions)) as pool, pool.scoring() as scoring:
        scoring.add(early)
        until((here / "noted").exists)
        scoring.add(late)  # only once the first is being scored
        groups, stats = scoring.result([late, early])
    assert rewards(groups, "exact") == [[0.0, 1.0], [1.0, 0.0]]
    assert stats.errors == stats.not_applicable == {"exact": 0, "notes": 0}
    assert not early.samples[0].rewards  # scoring makes new samples


def test_any_thread_gets_the_future_of_a_groups_scores(here: Path) -> None:
    with RewardPool(config(workers=2, rank={"function": "pool_rewards.rank"})) as pool:
        with ThreadPoolExecutor(8) as threads:
            groups = [group(index, ["c", "a", "b"][: index % 4]) for index in range(40)]  # also of none
            futures = list(threads.map(pool.submit, groups))
        found = [future.result(60) for future in futures]
    assert [rewards(scores.groups, "rank") for scores in found] == [
        [[[], [0.0], [1.0, 0.0], [2.0, 0.0, 1.0]][index % 4]] for index in range(40)
    ]
    assert all(scores.stats.errors == {"rank": 0} for scores in found)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(groups[0]).result(0)


def test_a_failure_ends_a_batch_of_which_more_groups_come(here: Path) -> None:
    with RewardPool(config(mood={"function": "pool_rewards.moody"})) as pool:
        with pytest.raises(UserError, match="no mood"), pool.scoring() as scoring:
            scoring.add(group(3, ["raise"]))
            while True:
                scoring.add(group(4, ["fine"]))
        with pool.scoring() as scoring:
            assert scoring.result([]).stats.errors == {"mood": 0}  # forgotten


def test_what_is_given_up_holds_nobody_up_and_costs_others_nothing(here: Path) -> None:
    """The worker of a call that hangs is replaced; calls beside it are made again."""
    with RewardPool(config(mood={"function": "pool_rewards.moody", "timeout": 900})) as pool:
        hanging = pool.submit(group(0, ["hang"]))
        (pid,) = until(lambda: worker_pids(here))
        others = [pool.submit(group(index, ["fine"])) for index in (1, 2)]
        assert hanging.cancel() and others[0].cancel()
        assert rewards(others[1].result(60).groups, "mood") == [[1.0]]
        assert not alive(pid)


CAUSES = [
    ("raise", r"ValueError: no mood \(.*pool_rewards\.py:16\)"),
    ("hang", r"took longer than 0\.7 s"),
    ("die", "its process ended with exit code 76"),
    ("kill", "its process ended by signal 9"),
    ("exit", "SystemExit: bye"),
    ("nan", "returned nan for a sample"),
]


@pytest.mark.parametrize(("text", "cause"), CAUSES)
def test_on_error_raise_names_function_sample_and_cause(here: Path, text: str, cause: str) -> None:
    cfg = config(mood={"function": "pool_rewards.moody", "timeout": 0.7})
    with RewardPool(cfg) as pool:
        with pytest.raises(UserError, match=cause) as failed:
            pool.score([group(11, ["fine", "fine"]), group(12, ["fine", text, "fine"]), group(13, [text])])
        message = str(failed.value)
        assert "'mood' (pool_rewards.moody)" in message and "prompt 12" in message and f"'{text}'" in message
        after = [group(14, ["fine"])]
        after, _ = pool.score(after)  # the pool is whole again, and has forgotten the other failure
        assert rewards(after, "mood") == [[1.0]]


def test_on_error_zero_counts_the_failed_samples_and_keeps_the_others(here: Path) -> None:
    texts = [text for text, _ in CAUSES]
    cfg = config(
        workers=2,
        mood={"function": "pool_rewards.moody", "timeout": 0.7, "on_error": "zero"},
        length={"function": "pool_rewards.length"},
    )
    groups = [group(0, ["fine", *texts, "none"]), group(1, ["fine", "fine"])]
    with RewardPool(cfg) as pool:
        groups, stats = pool.score(groups)
    assert rewards(groups, "mood") == [[1.0, *[0.0] * len(texts), None], [1.0, 1.0]]
    assert rewards(groups, "length") == [[float(len(s.text)) for s in g.samples] for g in groups]
    assert stats.errors == {"mood": len(texts), "length": 0}
    assert stats.not_applicable == {"mood": 1, "length": 0}
    assert list(stats.failures) == ["mood"] and "prompt 0" in stats.failures["mood"]


def test_on_error_none_takes_failed_samples_out_of_their_groups(here: Path) -> None:
    mood = {"function": "pool_rewards.moody", "on_error": "none"}
    groups = [group(0, ["fine", "raise", "none", "exit"]), group(1, ["nan"]), group(2, ["fine", "fine"])]
    with RewardPool(config(mood=mood, length={"function": "pool_rewards.length"})) as pool:
        found, stats = pool.score(groups)
        assert [[sample.text for sample in one.samples] for one in found] == [["fine", "none"], [], ["fine", "fine"]]
        assert rewards(found, "mood") == [[1.0, None], [], [1.0, 1.0]]
        assert rewards(found, "length") == [[4.0, 4.0], [], [4.0, 4.0]]
        assert (stats.errors, stats.not_applicable) == ({"mood": 3, "length": 0}, {"mood": 1, "length": 0})
        with pytest.raises(UserError, match=r"no sample is left: reward function 'mood' .* prompt 3: ValueError"):
            pool.score([group(3, ["raise"]), group(4, ["nan"])])


def test_a_failed_call_is_made_again_as_often_as_the_config_says(here: Path) -> None:
    def unsteady(times: int, **more: Any) -> Any:
        return {"function": "pool_rewards.unsteady", "args": {"times": times}, "on_error": "zero", **more}

    with RewardPool(config(once=unsteady(1, retries=1))) as pool:
        groups, stats = pool.score([group(0, ["a"]), group(1, ["b"])])
    assert (rewards(groups, "once"), stats.errors) == ([[2.0], [2.0]], {"once": 0})
    with RewardPool(config(always=unsteady(9, retries=2, scope="group"))) as pool:
        groups, stats = pool.score([group(0, ["c", "d"])])
    assert (rewards(groups, "always"), stats.errors) == ([[0.0, 0.0]], {"always": 2})
    assert "ConnectionError: no answer" in stats.failures["always"]
    assert len((here / "tried.c").read_text()) == 3  # once, and two retries


def test_a_failure_of_no_sample_alone_is_the_groups(here: Path) -> None:
    groups = [group(5, ["a", "b", "c"])]
    failure = pytest.raises(UserError, match=r"prompt 5: returned 1 values for 3 completions.*on the whole group")
    with RewardPool(config(short={"function": "pool_rewards.short"})) as pool, failure:
        pool.score(groups)
    with RewardPool(config(short={"function": "pool_rewards.short", "on_error": "zero"})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"short": 3}
    assert rewards(groups, "short") == [[0.0, 0.0, 0.0]]


def test_a_function_that_compares_a_group_fails_with_all_its_samples(here: Path) -> None:
    groups = [group(0, ["a", "bbb"], answer="x"), group(1, ["cc", "fail", ""], answer="y"), group(2, ["d"], answer="z")]
    compared = {"function": "pool_rewards.compared", "scope": "group", "on_error": "zero"}
    with RewardPool(config(compared=compared)) as pool:
        groups, stats = pool.score(groups)
    assert rewards(groups, "compared") == [[-2.0, 0.0], [0.0, 0.0, 0.0], [0.0]]
    assert stats.errors == {"compared": 3}
    assert (here / "calls.txt").read_text().split() == ["2", "3", "1"]  # never on a part of a group


def test_a_function_gets_a_whole_batch_once_it_is_there_and_keeps_apart_whose_sample_is_whose(here: Path) -> None:
    groups = [group(0, ["a", "bbb"], answer="x"), group(1, [], answer="y"), group(2, ["dd"], answer=None)]
    compared = {"function": "pool_rewards.compared", "scope": "batch"}
    with RewardPool(config(compared=compared, exact={"function": "exact_match"})) as pool:
        with pool.scoring() as scoring:
            for one in groups:
                scoring.add(one)
            pool.submit(groups[0]).result(60)  # after the others
            assert not (here / "calls.txt").exists()
            found, stats = scoring.result(groups)
        assert rewards(found, "compared") == [[-2.0, 0.0], [], [-1.0]]
        assert rewards(found, "exact") == [[0.0, 0.0], [], [None]]
        assert (stats.errors, stats.not_applicable) == ({"compared": 0, "exact": 0}, {"compared": 0, "exact": 1})
        with pytest.raises(UserError, match=r"'compared' .* prompt 5: ValueError: cannot compare"):
            pool.score([group(5, ["a", "fail"], answer="x"), group(6, ["b"], answer="y")])
    assert (here / "calls.txt").read_text().split() == ["3", "3"]


def test_a_function_that_compares_is_called_again_where_its_worker_was_killed(here: Path) -> None:
    groups = [group(0, ["a", "SIGKILL", "c"]), group(1, ["d"])]
    with RewardPool(config(once={"function": "pool_rewards.once", "scope": "batch"})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"once": 0}
    assert rewards(groups, "once") == [[4.0, 4.0, 4.0], [4.0]]


def test_episodes_of_several_turns_are_compared_as_messages(here: Path) -> None:
    talks = [
        [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "c"}],
        [{"role": "assistant", "content": "d"}],
    ]
    samples = [one_row([0], text="...", messages=messages) for messages in talks]
    episodes = Group(Prompt(0, [1], [{"role": "user", "content": "Q?"}], {"answer": "x"}), samples)
    with RewardPool(config(compared={"function": "pool_rewards.compared", "scope": "group"})) as pool:
        assert rewards(pool.score([episodes]).groups, "compared") == [[0.0, -3.0]]


def test_a_slow_group_is_no_hang_and_is_still_scored_as_a_group(here: Path) -> None:
    groups = [group(0, ["a", "b", "c", "d"]), group(1, ["a", "b", "c", "d"])]
    with RewardPool(config(slow={"function": "pool_rewards.slow", "timeout": 1.0})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"slow": 0}
    assert rewards(groups, "slow") == [[4.0] * 4, [4.0] * 4]


def test_a_function_that_forks_and_returns_twice_scores_once(here: Path) -> None:
    cfg = config(workers=1, forks={"function": "pool_rewards.forks"})
    groups = [group(i, ["a" * (i + 1), "b"]) for i in range(6)]
    with RewardPool(cfg) as pool:
        groups, _ = pool.score(groups)
    assert rewards(groups, "forks") == [[i + 1.0, 1.0] for i in range(6)]


def test_a_function_that_writes_to_or_closes_what_is_not_its_own_fails_by_name(here: Path) -> None:
    cfg = config(
        everywhere={"function": "pool_rewards.everywhere", "on_error": "zero"},
        length={"function": "pool_rewards.length"},
    )
    texts = [
        "write b'garbage'",
        "write b'garbage\\n'",
        "write b'7\\n'",
        "write b'{}\\n'",
        """write b'{"call": 0, "scores": [9.0], "failed": null}\\n'""",
        "write bytes([0, 0, 0, 200])",
        "close",
        "replace",
    ]
    with RewardPool(cfg) as pool:
        for text in texts:
            groups = [group(0, [text]), group(1, ["a", "bb"])]
            groups, stats = pool.score(groups)
            assert rewards(groups, "everywhere") == [[0.0], [1.0, 1.0]], text
            assert rewards(groups, "length") == [[float(len(text))], [1.0, 2.0]]
            assert stats.errors == {"everywhere": 1, "length": 0}
            assert "wrote to a file descriptor that is not its own, or closed it" in stats.failures["everywhere"], text


@pytest.mark.parametrize("scores", ["[1.0, 2.0, 3.0]", "['1.0']", "[nan]", "{'a': 1}"])
def test_an_answer_without_usable_scores_is_the_functions_failure(here: Path, scores: str) -> None:
    text = f"answer {scores}"
    groups = [group(0, ["fine", text]), group(1, ["fine"])]
    with RewardPool(config(patches={"function": "pool_rewards.patches", "on_error": "zero"})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"patches": 1}
        assert rewards(groups, "patches") == [[1.0, 0.0], [1.0]]


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_a_worker_that_is_hit_from_outside_is_not_the_functions_failure(here: Path, signal_name: str) -> None:
    once = {"function": "pool_rewards.once", "timeout": 3.0}
    groups = [group(0, [signal_name]), group(1, ["a", "b", "c"])]
    with RewardPool(config(once=once)) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"once": 0}
    assert rewards(groups, "once") == [[1.0], [3.0, 3.0, 3.0]]


def test_a_group_whose_worker_is_killed_is_still_scored_as_a_group(here: Path) -> None:
    groups = [group(0, ["a", "SIGKILL", "c"])]
    with RewardPool(config(once={"function": "pool_rewards.once"})) as pool:
        groups, stats = pool.score(groups)
        assert stats.errors == {"once": 0}
    assert rewards(groups, "once") == [[3.0, 3.0, 3.0]]


def test_half_an_answer_does_not_hold_the_pool_beyond_the_time_limit(here: Path) -> None:
    cfg = config(drip={"function": "pool_rewards.drip", "timeout": 1.0})
    with RewardPool(cfg) as pool, pytest.raises(UserError, match="took longer than 1 s"):
        pool.score([group(0, ["a"])])


def test_a_worker_that_dies_between_batches_is_replaced(here: Path) -> None:
    with RewardPool(config(mood={"function": "pool_rewards.moody"})) as pool:
        pool.score([group(0, ["fine"])])
        (pid,) = worker_pids(here)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        groups, _ = pool.score([group(1, ["fine", "fine"])])
    assert rewards(groups, "mood") == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import absent_package", "importing 'pool_import' failed: ModuleNotFoundError"),
        ("import os; os._exit(4)", "importing 'pool_import.f' for 'f': its process ended with exit code 4"),
        ("x = 1", "has no 'f'"),
        ("import time; time.sleep(1000)", r"importing 'pool_import.f' for 'f': took longer than 0.5 s; reward.start"),
        ("import os; os.environ['SOME_API_KEY']", r"KeyError: 'SOME_API_KEY'.*; reward.env=\[SOME_API_KEY\] lets"),
    ],
)
def test_functions_that_cannot_be_loaded_end_the_start(
    here: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "value")
    (here / "pool_import.py").write_text(text)
    cfg = config(start_timeout=0.5, f={"function": "pool_import.f"})
    with pytest.raises(UserError, match=message), RewardPool(cfg):
        pass


def test_a_worker_that_is_killed_while_it_starts_is_replaced(here: Path) -> None:
    (here / "pool_import.py").write_text(
        "import os, pathlib\n"
        "from pool_rewards import length as f\n"
        "if not pathlib.Path('died').exists():\n"
        "    pathlib.Path('died').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    with RewardPool(config(f={"function": "pool_import.f"})) as pool:
        groups, _ = pool.score([group(0, ["abc"])])
    assert rewards(groups, "f") == [[3.0]] and (here / "died").exists()


def test_functions_see_no_secrets_but_those_that_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, kept = ["JUDGE_API_KEY", "TOKENIZERS_PARALLELISM"], ["WANDB_API_KEY", "HF_TOKEN", "SAPO_API_KEY", "DB_PWD"]
    for name in shown + kept:
        monkeypatch.setenv(name, "value")
    groups = [group(0, shown), group(1, kept)]
    cfg = config(env=("JUDGE_API_KEY",), secrets={"function": "pool_rewards.secrets", "on_error": "zero"})
    with RewardPool(cfg) as pool:
        groups, stats = pool.score(groups)
    assert rewards(groups, "secrets") == [[1.0, 1.0], [0.0] * 4]
    assert stats.errors == {"secrets": 4}
    assert "KeyError: 'WANDB_API_KEY'" in stats.failures["secrets"]
    assert "reward.env=[WANDB_API_KEY]" in stats.failures["secrets"]


def test_what_functions_print_is_in_the_log(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = here / "logs" / "rewards.log"
    cfg = config(chatty={"function": "pool_rewards.chatty"}, mood={"function": "pool_rewards.moody"})
    with RewardPool(cfg, log) as pool:
        pool.score([group(0, ["fine"])])
        with pytest.raises(UserError, match=r"exit code 76; what it printed: .*rewards\.log"):
            pool.score([group(0, ["die"])])
    assert "printed by chatty\nand its stderr\n" in log.read_text()
    assert capfd.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_is_named(here: Path) -> None:
    (here / "logs").touch()
    cfg = config(length={"function": "pool_rewards.length"})
    with pytest.raises(UserError, match="logs"), RewardPool(cfg, here / "logs" / "rewards.log"):
        pass


def test_an_argument_that_a_users_function_does_not_take_is_refused_before_it_is_called(here: Path) -> None:
    (here / "pool_narrow.py").write_text(
        "def narrow(completions, scale=1.0):\n    return [scale for _ in completions]\n"
    )
    misspelt = config(mine={"function": "pool_narrow.narrow", "args": {"scael": 2.0}})
    told = r"^reward\.functions\.mine\.args\.scael: unknown argument; did you mean 'scale'\? valid: scale$"
    with pytest.raises(UserError, match=told), RewardPool(misspelt):
        pass
    groups = [group(0, ["a", "b"])]
    with RewardPool(config(mine={"function": "pool_narrow.narrow", "args": {"scale": 2.0}})) as pool:
        scored, _ = pool.score(groups)
    assert rewards(scored, "mine") == [[2.0, 2.0]]


def test_columns_that_functions_cannot_do_with_are_refused(here: Path) -> None:
    judge = {"function": "pool_rewards.judge", "args": {"scale": 2.0}}
    with RewardPool(config(judge=judge, length={"function": "pool_rewards.length"})) as pool:
        pool.check_columns(["answer", "solution"], "the data")
        missing = (
            r"'judge' \(pool_rewards\.judge\) needs 'solution', which is no column of the data .*valid: answer, level"
        )
        with pytest.raises(UserError, match=missing):
            pool.check_columns(["answer", "level"], "the data")
        for column in ("prompts", "completions", "completion_ids"):
            with pytest.raises(UserError, match=f"the held-out data has a column '{column}', .* rename"):
                pool.check_columns(["solution", column], "the held-out data")


def test_leaving_the_pool_ends_its_workers(here: Path) -> None:
    with RewardPool(config(workers=2, mood={"function": "pool_rewards.moody"})) as pool:
        pool.score([group(index, ["fine"]) for index in range(20)])
        pids = worker_pids(here)
        assert pids and all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)


def test_leaving_the_pool_ends_what_functions_have_started(here: Path) -> None:
    with RewardPool(config(leaves={"function": "pool_rewards.leaves"})) as pool:
        pool.score([group(0, ["fine"])])
        pids = worker_pids(here)
        assert len(pids) == 4 and all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("death", [signal.SIGINT, signal.SIGKILL])
def test_workers_and_what_they_have_started_die_with_their_parent(here: Path, death: signal.Signals) -> None:
    script = here / "parent.py"
    script.write_text(
        "from sapo_rl.config import RewardConfig, RewardFunctionConfig\n"
        "from sapo_rl.rewards import RewardPool\n"
        "from sapo_rl.types import Group, Prompt, Row, Sample, Stop\n"
        "cfg = RewardConfig({'mood': RewardFunctionConfig(function='pool_rewards.leaves', timeout=900)}, 1)\n"
        "groups = [Group(Prompt(0, [1], 'Q', {}), [Sample([Row([1], [0])], Stop.STOP, (0, 0), text='hang')])]\n"
        "with RewardPool(cfg) as pool:\n"
        "    pool.score(groups)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], env=env, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (here / "left").exists() and len(worker_pids(here)) == 4)
        pids = worker_pids(here)
        assert all(alive(pid) for pid in pids)
        parent.send_signal(death)
        assert parent.wait(timeout=60) != 0
        until(lambda: not any(alive(pid) for pid in pids))
    finally:
        parent.kill()


def test_closing_ends_what_another_thread_scores_and_starts_nothing(here: Path) -> None:
    pool = RewardPool(config(slow={"function": "pool_rewards.slow"}, notes={"function": "pool_rewards.notes"}))
    pool.__enter__()
    groups = [group(index, ["a"]) for index in range(200)]
    with ThreadPoolExecutor(1) as thread:
        scoring = thread.submit(pool.score, groups)
        until((here / "noted").exists)
        pool.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="closed"):
            scoring.result(timeout=10)
    assert not any(alive(pid) for pid in worker_pids(here))
