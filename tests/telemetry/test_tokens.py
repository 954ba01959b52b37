"""The values of tokens on disk, and the text of each token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from samples import one_row
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sapo_rl.config import Config
from sapo_rl.telemetry import Telemetry, Timers, rows
from sapo_rl.telemetry.sinks.pieces import Pieces
from sapo_rl.telemetry.sinks.tokens import write_tokens
from sapo_rl.telemetry.steps import RankReport, StepLog, placed
from sapo_rl.types import Batch, Group, Place, Prompt, Replayed, RewardStats, Row, TokenValues, Usage

TEXTS = ("one two", "  é ß", "🦥🦥", "€ and ½", "tab\tline\n\nend ", "日本")


def byte_level() -> PreTrainedTokenizerFast:
    """A token a byte, as in GPT-2's vocabulary before any merge."""
    vocab = {one: number for number, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Words that begin with their space, which is taken from the first of a text; bytes for what is no word."""
    words = ["▁", "a", "b", "▁one", "▁two", "▁a", "é"]
    vocab = {one: number for number, one in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [make_tokenizer, byte_level, sentence_piece])
def test_the_pieces_of_a_text_are_one_for_each_token_and_together_the_text(make: Any) -> None:
    tokenizer = make()
    pieces = Pieces(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(f"a{text}", add_special_tokens=False)
        found = pieces(ids)
        assert len(found) == len(ids)
        assert "".join(found).removeprefix(" ") == tokenizer.decode(ids)
    assert pieces([]) == []


def test_a_character_of_several_tokens_is_the_last_ones_and_half_a_character_is_shown_as_such() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("x🦥y", add_special_tokens=False)
    pieces = Pieces(tokenizer)
    assert pieces(ids) == ["x", "", "", "", "🦥", "y"]
    assert pieces(ids[:3]) == ["x", "", "\ufffd"]
    assert pieces([ids[0], ids[2], ids[5]]) == ["x", "\ufffd", "y"]
    assert pieces(ids[1:4] * 2) == ["", "", "", "", "", "\ufffd\ufffd"]
    assert "".join(pieces(ids[1:4] * 2 + ids)) == tokenizer.decode(ids[1:4] * 2 + ids)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_of_a_long_stream_of_half_characters_only_short_texts_are_decoded(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    lengths: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: lengths.append(len(ids)) or decode(ids, **kwargs))
    ids = tokenizer.encode("x🦥y", add_special_tokens=False)
    sloth = ids[-5:-1]  # a token each byte
    for half in (sloth[:1], sloth[:2], sloth[:3], sloth[1:2], sloth[2:]):
        broken = half * 600
        found = Pieces(tokenizer)([*broken, *ids])
        assert len(found) == 600 * len(half) + len(ids)
        assert "".join(found) == decode([*broken, *ids])
    assert max(lengths) < 20


def test_special_tokens_have_their_names() -> None:
    tokenizer = make_tokenizer()
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert Pieces(tokenizer)([*tokenizer.encode("hi", add_special_tokens=False), end]) == ["h", "i", "<|im_end|>"]


def values(place: Place, found: list[Row], first: float) -> TokenValues:
    """Values that count on from `first`."""
    count = sum(row.num_trained for row in found)
    columns = {name: first + np.arange(count, dtype=np.float32) for name in ("logps", "ratio")}
    return TokenValues(place, found, advantage=first, weight=0.5, columns=columns)


def test_a_row_of_the_file_is_a_row_of_a_sample_with_a_value_for_each_token(tmp_path: Path) -> None:
    episode = [Row([1], [5, 6, 7, 8], loss_mask=[(1, 2), (3, 4)]), Row([1, 5], [9])]
    earlier, plain = values(Place(0, 0, 0), [Row([1], [3])], 20.0), values(Place(1, 0, 0), [Row([1], [4, 4])], 10.0)
    found = [(None, earlier), (7, plain), (2, values(Place(0, 1, 0), episode, 0.0))]
    path = write_tokens(tmp_path, 12, found, lambda ids: [f"<{one}>" for one in ids])
    assert path == tmp_path / "completions/tokens_00012.parquet"
    table = pq.read_table(path)
    assert table.select(["step", "sample", "row", "advantage", "weight"]).to_pydict() == {
        "step": [12] * 4,
        "sample": [2, 2, 7, None],
        "row": [0, 1, 0, 0],
        "advantage": [0.0, 0.0, 10.0, 20.0],
        "weight": [0.5] * 4,
    }
    assert table["token_ids"].to_pylist() == [[5, 6, 7, 8], [9], [4, 4], [3]]
    assert table["texts"].to_pylist() == [["<5>", "<6>", "<7>", "<8>"], ["<9>"], ["<4>", "<4>"], ["<3>"]]
    assert table["trained"].to_pylist() == [[False, True, False, True], [True], [True, True], [True]]
    assert table["ratio"].to_pylist() == [[None, 0.0, None, 1.0], [2.0], [10.0, 11.0], [20.0]]
    assert table["logps"].type.value_type.to_pandas_dtype() is np.float32


def test_samples_of_several_ranks_are_found_in_the_completions_and_those_of_earlier_steps_are_not() -> None:
    group = rows(1, Group(Prompt(0, [1], "a", {}), [one_row([7]), one_row([8])]))
    places = (Place(0, 1, 1), Place(1, 0, 1), Place(1, 1, 0))
    here, there, old = (values(place, [Row([1], [7])], 0.0) for place in places)
    nothing = RankReport([group, group], RewardStats({}, {}, {}), Usage([], 0.0), 0, 0.0, [], (), 0, {}, [])
    first, second = nothing._replace(values=[there]), nothing._replace(values=[old, here], ages={1: 3})
    assert placed([first, second]) == [(5, there), (None, old), (3, here)]
    assert placed([nothing, nothing]) == []


def test_a_step_that_is_made_again_without_them_has_none_of_before(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Timers, "take", lambda self: {"time/step": 1.0})
    group = Group(Prompt(0, [1], "a", {}), [one_row([7], rewards={"match": 1.0}, reward=1.0) for _ in range(2)])
    batch = Batch([group], RewardStats({}, {}, {}), {}, Usage([1.0], 1.0), replayed={0: Replayed(group, 2)})
    found = [values(Place(0, 0, 0), [Row([1], [7])], 0.0)]
    timers = Timers(None)
    with Telemetry(config, tmp_path, pieces=lambda ids: ["x"] * len(ids)) as telemetry:
        log = StepLog(telemetry, timers, config)
        path = tmp_path / "completions/tokens_00001.parquet"
        log.log(1, batch, {"policy/loss": 0.0}, restarts=0, peak=0.0, values=found)
        assert pq.read_table(path)["sample"].to_pylist() == [None]
        log.log(1, batch, {"policy/loss": 0.0}, restarts=0, peak=0.0)
        assert not path.exists()
