"""Environments that behave, and some that misbehave in every way we know, as a user writes them into a module."""

from __future__ import annotations

MODULE = '''
import asyncio, os, signal, sys, time
from pathlib import Path


class Echo:
    """Says back what it hears, `turns` times; a reply that is the word for something has that happen."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def reset(self, word="", seed=0, **row):
        Path(f"worker.{os.getpid()}").touch()
        self.word, self.heard, self.drawn = word, 0, seed % 1000
        if word == "reset":
            raise ValueError("no game today")

    def step(self, reply):
        if reply.startswith("do "):
            getattr(self, reply[3:].strip())()
        self.heard += 1
        done = self.heard == self.turns
        return (None if done else f"you said {reply}", 0.5, done, {"heard": self.heard, "drawn": self.drawn})

    def close(self):
        Path("closed").touch()

    def fail(self):
        raise ValueError("no mood")

    def hang(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)

    def hang_once(self):
        if not Path("hung").exists():
            Path("hung").touch()
            time.sleep(1000)

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_once(self):
        if not Path("died").exists():
            Path("died").touch()
            self.die()

    def exit(self):
        os._exit(3)

    def fork(self):
        os.fork()

    def shout(self):
        for _ in range(100):
            sys.stdout.write("x" * 2**20)
        sys.stdout.flush()

    def scribble(self):
        for fd in range(3, 400):
            try:
                os.write(fd, b"garbage\\n")
            except OSError:
                pass

    def leave(self):
        import subprocess
        sleep = [sys.executable, "-c", "import os, time; open(f'worker.{os.getpid()}', 'w'); time.sleep(1000)"]
        subprocess.Popen(sleep)
        subprocess.Popen(sleep, start_new_session=True)
        while len(list(Path.cwd().glob("worker.*"))) < 3:
            time.sleep(0.05)


class Undecided(Echo):
    """Does not say at the end how well it went."""

    def get_reward(self):
        raise ValueError("no verdict")


class Meeting(Echo):
    """The same, asynchronous: goes on only once 50 episodes of its process wait in `step`."""

    waiting = 0

    async def step(self, reply):
        Meeting.waiting += 1
        while Meeting.waiting < 50:
            await asyncio.sleep(0.01)
        return super().step(reply)


class Gymnasium:
    """Returns what Gymnasium's environments do."""

    def __init__(self, last: str) -> None:
        self.last = last

    def reset(self, seed=None):
        return "begin", {"seed": seed}

    def step(self, action):
        return f"you did {action}", 1.0, self.last == "terminated", self.last == "truncated", {"action": action}


class Answers:
    """Returns what the config says."""

    def __init__(self, found: str) -> None:
        self.found = eval(found)

    def reset(self):
        return None

    def step(self, reply):
        return self.found


class Shelf:
    """TRL's shape: tools and a reward."""

    def __init__(self) -> None:
        self.done = False

    def reset(self, word, **row) -> str:
        self.word, self.read = word, 0
        return " There is a shelf."

    def look(self, place: int) -> str:
        """
        Look at a place of the shelf.

        Args:
            place: Which one, from 1.

        Returns:
            What stands there.
        """
        self.read += 1
        if place < 1:
            raise ValueError("places begin at 1")
        return self.word * place

    async def finish(self) -> str:
        """
        End it.

        Returns:
            A word.
        """
        self.done = True
        return "over"

    def get_reward(self) -> dict:
        return {"read": self.read, "bonus": 0.25}


class Finisher:
    """TRL's shape, with a tool that is called as the attribute may be."""

    def reset(self):
        self.calls = 0

    def done(self) -> str:
        """
        Say that you are done.

        Returns:
            How often you have said so.
        """
        self.calls += 1
        return str(self.calls)

    def get_reward(self):
        return self.calls


class Mute:
    """Neither shape."""

    def reset(self):
        pass


def double(number: int) -> int:
    """
    Double a number.

    Args:
        number: Which.

    Returns:
        Twice that.
    """
    return 2 * number


def rows(count: int = 21):
    row, names = {"word": "ab", "answer": "ab"}, ("shelf", "guess", "agent")
    return [row | {"prompt": f"Look at {number}.", "environment": names[number % 3]} for number in range(count)]


def said(completions, **columns):
    """1 where a completion is a list of messages that begins with the model's."""
    return [float(one[0]["role"] == "assistant") for one in completions]


def make_echo(turns: int) -> Echo:
    return Echo(turns)
'''
"""What a user's `my_games.py` holds."""
