"""Games of the real package textarena."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from optional import needs
from scripted import config, one, play, prompt

from sapo_rl.config import Config
from sapo_rl.environments.adapters.textarena import TextArena, tasks
from sapo_rl.errors import UserError
from sapo_rl.types import Stop

pytestmark = needs("textarena")

OPPONENT = '''
def first_free(seen):
    """The first free cell of TicTacToe's board, or of a game whose board does not show it the lowest number."""
    import re
    free = re.findall(r"\\[(\\d)\\]", seen)
    return f"[{free[0] if free else 0}]"
'''


def guessing() -> Config:
    found = config("textarena", args={"game": "GuessTheNumber-v0"}, max_tokens=4096)
    found.data.max_prompt_tokens = 1000
    return found


def bisect(said: str) -> str:
    """Guess in the middle of what is left, as TextArena wants it."""
    low, high = 1, 20
    for guess, answer in re.findall(r"\[(\d+)\]<\|im_end\|>\n<\|im_start\|>user\nThe target number is (\w+)", said):
        low, high = (int(guess) + 1, high) if answer == "higher" else (low, int(guess) - 1)
    return f"[{(low + high) // 2}]"


def test_a_game_alone_is_won_by_who_can_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    groups = play(guessing(), bisect, prompt(0), prompt(1))
    samples = [sample for group in groups for sample in group.samples]
    assert {sample.stop for sample in samples} == {Stop.ENVIRONMENT}
    assert [sample.rewards for sample in samples] == [{"environment": 1.0}] * 4
    assert all(groups[place].samples[0].text == groups[place].samples[1].text for place in range(2))
    assert any(len(sample.turns) > 1 for sample in samples)
    assert samples[0].messages is not None
    assert all("You are playing" not in message["content"] for message in samples[0].messages)  # told once


def test_a_move_that_is_none_is_answered_and_a_second_one_ends_the_game(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = one(guessing(), lambda said: "five")
    assert len(sample.turns) == 2 and sample.rewards == {"environment": 0.0}
    assert sample.messages is not None and "invalid move" in sample.messages[1]["content"]


@pytest.mark.parametrize("player", [0, 1])
def test_an_opponent_of_ones_own_plays_the_other_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, player: int
) -> None:
    (tmp_path / "my_players.py").write_text(OPPONENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_players", raising=False)
    game = TextArena("TicTacToe-v0", opponent="my_players.first_free", player=player)
    seen = game.reset(seed=1)
    assert "Tic" in seen and ("[Player 0]" in seen) is (player == 1)
    observation, reward, done = game.step("[8]")
    assert observation is not None and (reward, done) == (0.0, False)
    assert f"[Player {1 - player}]" in observation
    while not done:
        free = re.findall(r"\[(\d)\]", observation or "")
        observation, reward, done = game.step(f"[{free[-1] if free else 7}]")
    assert reward in (-1.0, 0.0, 1.0)


def test_games_beside_each_other_draw_what_they_draw_alone() -> None:
    def begun(seed: int) -> Any:
        game = TextArena("GuessTheNumber-v0")
        game.reset(seed)
        return game

    before = random.getstate()
    first, second = begun(3), begun(4)
    assert random.getstate() == before
    assert first._game.game_number == begun(3)._game.game_number
    assert [first._game.game_number, second._game.game_number] == [
        begun(3)._game.game_number,
        begun(4)._game.game_number,
    ]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"game": "GuessTheNumbers-v0"}, r"no game 'GuessTheNumbers-v0'; did you mean 'GuessTheNumber-v0'\?"),
        ({"game": "TicTacToe-v0", "players": 2}, "opponent: must play the other 1 player"),
        ({"game": "TicTacToe-v0", "opponent": "random.random", "player": 2}, "player: is 2, must be below 2"),
    ],
)
def test_what_cannot_be_played_is_told(args: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        TextArena(**args)


def test_without_the_package_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(UserError, match=r"needs textarena: pip install 'sapo-train\[textarena\]'$"):
        TextArena("GuessTheNumber-v0")


def test_rows_for_games_have_a_prompt_each() -> None:
    assert len(tasks("train", 3)) == 3 and all(row["prompt"] for row in tasks("train", 3))
