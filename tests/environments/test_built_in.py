"""The environments of the project."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_rl.config import EnvironmentConfig
from sapo_rl.environments import Calculator, Guess, Wordle, calculator, check_environment, check_tool, wordle
from sapo_rl.environments.calculator import evaluate
from sapo_rl.environments.guess import tasks
from sapo_rl.errors import UserError


def test_guessing_answers_higher_lower_and_rewards_the_number() -> None:
    game = Guess(1, 100)
    game.reset(seed=3, answer="62")
    assert game.step("50") == ("higher", 0.0, False)
    assert game.step("Is it 50 or 75?") == ("lower", 0.0, False)  # the last number counts
    assert game.step("hm") == ("Guess a whole number from 1 to 100.", 0.0, False)
    assert game.step("62") == (None, 1.0, True)


def test_a_number_is_drawn_by_the_seed_where_the_row_has_none() -> None:
    drawn = []
    for seed in range(50):
        game = Guess(1, 6)
        game.reset(seed=seed)
        drawn.append(game.number)
        game.reset(seed=seed)
        assert game.number == drawn[-1]
    assert set(drawn) == {1, 2, 3, 4, 5, 6}


@given(st.integers(0, 9), st.lists(st.integers(-5, 20), max_size=10))
def test_shaping_pays_for_what_comes_nearer_and_less_than_its_share_in_all(number: int, guesses: list[int]) -> None:
    game = Guess(0, 9, shaping=0.5)
    game.reset(seed=0, answer=number)
    rewards = [game.step(str(guess))[1] for guess in guesses if guess != number]
    assert all(reward >= 0 for reward in rewards) and sum(rewards) < 0.5
    assert sum(rewards) + game.step(str(number))[1] == pytest.approx(1.0)
    if rewards:
        nearest = min(abs(guess - number) for guess in guesses if guess != number)
        assert sum(rewards) == pytest.approx(0.5 * max(0, 9 - nearest) / 9)


def test_the_prompts_of_a_split_are_always_the_same() -> None:
    rows = tasks("train", 100, 3, 5)
    assert rows == tasks("train", 100, 3, 5) != tasks("other", 100, 3, 5)
    assert {row["answer"] for row in rows} == {"3", "4", "5"}
    prompt = rows[0]["prompt"]
    assert [message["content"] for message in prompt[1:4]] == ["4", "higher", "5"]
    assert "from 3 to 5" in prompt[0]["content"] and prompt[-1]["role"] == "user"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(12 + 30) * 7 / 4", "73.5"),
        ("-3 % 5", "2"),
        ("7 // 2", "3"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333"),
        ("2 ** 100", str(2**100)),
        ("2 ** -2", "0.25"),
        ("48123 * 771 - 99999", str(48123 * 771 - 99999)),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert Calculator().calculate(expression) == value


@given(
    st.recursive(
        st.integers(0, 999).map(str),
        lambda s: st.tuples(s, st.sampled_from("+-*"), s).map("({0[0]}{0[1]}{0[2]})".format),
        max_leaves=12,
    )
)
def test_the_calculator_agrees_with_python(expression: str) -> None:
    assert evaluate(expression) == str(eval(expression))


@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 6))
def test_chains_say_how_their_answer_comes_about(fewest: int, more: int, size: int) -> None:
    rows = calculator.tasks("train", 20, [fewest, fewest + more], [size, size])
    for row in rows:
        said = row["prompt"].removesuffix(". What is the result?").split(". ")
        assert fewest <= len(said) - 1 <= fewest + more
        assert all(len(one.split()[-1]) == size for one in said)
        value = said[0].removeprefix("Begin with ")
        for one in said[1:]:
            word, _, number = one.replace("Multiply by", "Multiply").partition(" ")
            value = f"({value}) {'+-*'[['Add', 'Subtract', 'Multiply'].index(word)]} {number}"
        assert row["answer"] == str(eval(value)) == Calculator().calculate(value)


def test_chains_are_the_same_for_a_split_and_bounds_are_checked() -> None:
    held_out = calculator.tasks("held out", 300)
    assert held_out == calculator.tasks("held out", 300)
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in calculator.tasks("train", 300)}
    assert {row["prompt"].count(". ") for row in held_out} == {4, 5, 6}
    with pytest.raises(UserError, match=r"^data\.args\.digits: must be \[least, most\] within 1 to 18, got \[3, 2\]"):
        calculator.tasks("train", digits=[3, 2])


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("__import__('os')", "is no arithmetic"),
        ("x + 1", "'x' is no arithmetic"),
        ("True + 1", "'True' is no arithmetic"),
        ("1 if 2 else 3", "is no arithmetic"),
        ("(1", "is no arithmetic expression"),
        ("9 ** 9 ** 9", r"the exponent 3\.8\d*e\+08 must be a whole number from -200 to 200"),
        ("9 ** 200", "larger than 1e"),
        ("1e400", "larger than 1e"),
        ("1" * 501, "has 501 characters; at most 500"),
    ],
)
def test_the_calculator_refuses_what_is_no_arithmetic_or_too_large(expression: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        evaluate(expression)
    with pytest.raises(ZeroDivisionError, match="divides by 0"):
        evaluate("1 / (2 - 2)")


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("gues", {}, r"^environment\.name: unknown environment 'gues'; did you mean 'guess'\?"),
        ("guess", {"lwo": 1}, r"^environment\.args\.lwo: unknown argument; did you mean 'low'\?"),
        ("guess", {"low": "1"}, r"^environment\.args\.low: '1' is a str, must be int$"),
        ("no_such_module.Game", {}, r"^environment 'no_such_module\.Game': there is no module 'no_such_module'"),
    ],
)
def test_names_and_arguments_are_checked_before_anything_starts(name: str, args: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_environment(EnvironmentConfig(name, args))
    with pytest.raises(
        UserError, match=r"^'search' is no dotted path; a tool is a function of yours: my_tools\.search$"
    ):
        check_tool("search")


WORDS = ["crane", "slate", "allee", "elate", "eerie", "tiger"]


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text("\n".join(WORDS).upper() + "\n")
    return str(tmp_path / "words.txt")


@pytest.mark.parametrize(
    ("guess", "word", "marks"),
    [
        ("allee", "elate", "YG-YG"),
        ("eerie", "elate", "G---G"),  # the word has two: no mark for the third
        ("elate", "eerie", "G---G"),
        ("eerie", "tiger", "Y-YY-"),
        ("tiger", "tiger", "GGGGG"),
        ("slate", "crane", "--G-G"),
    ],
)
def test_wordle_marks_no_letter_more_often_than_the_word_has_it(guess: str, word: str, marks: str) -> None:
    assert wordle.compare(guess, word) == marks


@given(st.text("abc", min_size=4, max_size=4), st.text("abc", min_size=4, max_size=4))
def test_wordle_marks_are_as_many_as_both_words_share(guess: str, word: str) -> None:
    marks = wordle.compare(guess, word)
    shared = Counter(guess) & Counter(word)
    marked = Counter(letter for letter, mark in zip(guess, marks, strict=True) if mark != "-")
    assert marked == shared
    assert all((mark == "G") == (one == two) for one, two, mark in zip(guess, word, marks, strict=True))


def test_wordle_ends_with_the_word_or_the_last_guess_and_pays_one_in_all(words: str) -> None:
    game = Wordle(words, guesses=4, shaping=0.5)
    game.reset(seed=0, answer="Elate")
    assert game.step("My guess is SLATE.") == ("slate -GGGG. 3 left.", pytest.approx(0.4), False)
    assert game.step("crown") == ("That is no word of the list. 2 left.", 0.0, False)
    assert game.step("elate") == (None, pytest.approx(0.6), True)
    game.reset(seed=0, answer="elate")
    for left in (3, 2, 1):
        assert game.step("nothing at all")[0] == f"That is no word of the list. {left} left."
    assert game.step("slate") == (None, 0.0, True)


def test_wordles_held_out_words_are_never_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"{one}{two}{three}" for one in "abcd" for two in "abcde" for three in "abcdefgh"))
    train, held_out = (wordle.tasks(split, str(path), 400) for split in ("train", "test"))
    assert train == wordle.tasks("train", str(path), 400)
    assert not {row["answer"] for row in train} & {row["answer"] for row in held_out}
    assert 5 <= len({row["answer"] for row in held_out}) <= 30
    assert "3 letters in 6 guesses" in train[0]["prompt"][0]["content"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no words"),
        ("abc\nabcd\n", "word 2, 'abcd', must be 3 letters"),
        ("abc\na1c\n", "word 2, 'a1c', must be"),
    ],
)
def test_a_list_that_is_none_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        Wordle(str(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        Wordle(str(tmp_path / "nothing.txt"))
