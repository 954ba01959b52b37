"""Games of TextArena: the model plays alone, or against players that a function of the user's plays."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from sapo_rl import plugins
from sapo_rl.environments.adapters import package
from sapo_rl.environments.registry import ENVIRONMENTS
from sapo_rl.errors import UserError, did_you_mean

NAME = "textarena"
RAW = "-raw"
"""Ending of the games that tell a player what is new, not all from the beginning on."""


@ENVIRONMENTS.register_module(NAME)
class TextArena:
    """Plays a game of TextArena as one of its players; the game's reward for it is the episode's.

    Args:
        game: its id, such as `GuessTheNumber-v0`.
        settings: what else the game takes, such as `max_number: 50`.
        opponent: dotted path of `f(seen: str) -> str`, which plays all other players; `seen` is what is new for one.
        players: how many there are; by default 1, or 2 with an opponent.
        player: which of them the model is, from 0.

    Raises:
        UserError: no package textarena, or no such game.
    """

    def __init__(
        self,
        game: str,
        settings: dict[str, Any] | None = None,
        opponent: str | None = None,
        players: int | None = None,
        player: int = 0,
    ) -> None:
        arena = package(NAME, NAME)
        known = arena.envs.registration.ENV_REGISTRY
        if f"{game}{RAW}" not in known:
            games = [name.removesuffix(RAW) for name in known if name.endswith(RAW)]
            near = did_you_mean(game, games).partition("valid:")[0].strip() or f"there are {len(games)}"
            raise UserError(f"environment.args.game: TextArena has no game '{game}'; {near}")
        self._players = players or (1 if opponent is None else 2)
        if self._players > 1 and opponent is None:
            raise UserError(f"environment.args.opponent: must play the other {self._players - 1} player(s) of the game")
        if not 0 <= player < self._players:
            raise UserError(f"environment.args.player: is {player}, must be below {self._players}")
        self._opponent: Callable[[str], str] | None = plugins.find("opponent", opponent) if opponent else None
        self._player = player
        self._game = arena.make(f"{game}{RAW}", **(settings or {}))
        self._random = random.getstate()

    def reset(self, seed: int) -> str:
        """Begin a game; what the model sees first goes to the end of the prompt."""
        with self._own_random():
            self._game.reset(num_players=self._players, seed=seed)
            return self._play_others(done=False)[0]

    def step(self, reply: str) -> tuple[str | None, float, bool]:
        """Make the model's move, then those of the others."""
        with self._own_random():
            done, _ = self._game.step(action=reply)
            seen, done = self._play_others(done)
            if not done:
                return seen, 0.0, False
            rewards, _ = self._game.close()
        earned: Mapping[int, float] = rewards or {}
        return None, float(earned.get(self._player, 0.0)), True

    def _play_others(self, done: bool) -> tuple[str, bool]:
        """Return what is new for the model once it is its turn, and whether the game is over."""
        while not done:
            player, new = self._game.get_observation()
            seen = self._told(player, new)
            if player == self._player:
                return seen, False
            assert self._opponent is not None
            done, _ = self._game.step(action=str(self._opponent(seen)))
        return "", True

    def _told(self, player: int, new: Sequence[tuple[int, str, Any]]) -> str:
        """What is new for a player as text; not what it has said itself."""
        roles = self._game.state.role_mapping
        lines = [
            text if sender < 0 else f"[{roles.get(sender, f'Player {sender}')}] {text}"
            for sender, text, _ in new
            if sender != player
        ]
        return "\n".join(lines) or "Go on."

    @contextlib.contextmanager
    def _own_random(self) -> Generator[None]:
        """Have the game draw from a stream of its own: all games of a process share Python's."""
        others = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(others)


def tasks(split: str, count: int = 256, prompt: str = "Let us play a game.\n\n") -> list[dict[str, str]]:
    """Return `count` rows with the same prompt, behind which the game explains itself; a source of data.

    Each row is a game of its own: what is drawn depends on the row, the step and the run's seed.
    """
    return [{"prompt": prompt, "split": split} for _ in range(count)]
