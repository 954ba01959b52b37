"""From the data section of the config to rows: training rows and held-out rows."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from sapo_rl.config import DataConfig
from sapo_rl.data import arithmetic, gym, own, tables
from sapo_rl.data.prompts import Rows, check_columns, check_wording, value_of, wording_columns
from sapo_rl.errors import UserError


def check_source(cfg: DataConfig) -> None:
    """Refuse early what `load_rows` would refuse; loads neither torch nor datasets.

    Raises:
        UserError: a missing path or file, an unknown ending, generator or argument, an impossible wording.
    """
    check_wording(cfg)
    if cfg.source == "arithmetic":
        arithmetic.parse_args(cfg.args)
    elif cfg.source == "reasoning_gym":
        gym.create(_path(cfg), cfg.args, size=1, seed=0)
    elif cfg.source == "huggingface":
        _path(cfg)
    elif cfg.source == "file":
        tables.check_file("data.path", cfg.path)
        if cfg.eval_path is not None:
            tables.check_file("data.eval_path", cfg.eval_path)


def load_rows(cfg: DataConfig, eval_prompts: int) -> tuple[Rows, Rows]:
    """Return the training rows and `eval_prompts` held-out rows; no prompt is in both.

    Generators make `cfg.size` training rows, or as many as there are different questions once the held-out rows are
    taken. Of `eval_path` or `eval_split` a choice by `cfg.split_seed` is taken, all rows where there are fewer; with
    neither, such a choice is held out of the training rows, and rows with the same wording leave them too. Rows that
    were read keep their number.

    Raises:
        UserError: the source is missing, empty, or too small to hold out `eval_prompts` and train on the rest.
    """
    if cfg.source in ("arithmetic", "reasoning_gym"):
        rows = _generate(cfg, cfg.size + eval_prompts)
        held_out, train = dict(enumerate(rows[:eval_prompts])), dict(enumerate(rows[eval_prompts:]))
        if not train:
            raise UserError(
                f"data.args: there are only {len(rows)} different questions, eval.prompts={eval_prompts} leaves none "
                "to train on; widen the arguments or hold out fewer"
            )
        return train, held_out
    train = _read(cfg, _key(cfg), cfg.path, cfg.split)
    if eval_prompts == 0:
        return train, {}
    rng = random.Random(f"held-out/{cfg.split_seed}")
    if cfg.source == "file" and cfg.eval_path is not None:
        return train, _choose(_read(cfg, "data.eval_path", cfg.eval_path, ""), eval_prompts, rng)
    if cfg.source != "file" and cfg.eval_split is not None:
        return train, _choose(_read(cfg, _key(cfg), cfg.path, cfg.eval_split), eval_prompts, rng)
    check_columns(cfg, train.values())
    return _hold_out(train, eval_prompts, _key(cfg), wording_columns(cfg), rng)


def load_set(cfg: DataConfig, prompts: int | None) -> Rows:
    """Return the rows of a set of evaluations: `prompts` of them, a choice by `cfg.split_seed`, or all.

    Generators make them by another seed than rows to train on. Rows that were read keep their number.

    Raises:
        UserError: the source is missing or empty, or a generator is not told how many.
    """
    if cfg.source in ("arithmetic", "reasoning_gym"):
        if prompts is None:
            raise UserError(f"eval.prompts: must be given; {cfg.source} makes as many prompts as it is asked for")
        apart = replace(cfg, split_seed=random.Random(f"set/{cfg.split_seed}").getrandbits(31))
        return dict(enumerate(_generate(apart, prompts)))
    rows = _read(cfg, _key(cfg), cfg.path, cfg.split)
    return rows if prompts is None else _choose(rows, prompts, random.Random(f"held-out/{cfg.split_seed}"))


def _key(cfg: DataConfig) -> str:
    """The key that says where the rows are."""
    return "data.source" if own.is_own(cfg.source) else "data.path"


def _generate(cfg: DataConfig, count: int) -> list[dict[str, Any]]:
    if cfg.source == "arithmetic":
        return arithmetic.generate(cfg.args, count, cfg.split_seed)
    return gym.generate(_path(cfg), cfg.args, count, cfg.split_seed)


def _read(cfg: DataConfig, key: str, path: str | None, split: str) -> Rows:
    if own.is_own(cfg.source):
        path, rows = cfg.source, own.read(cfg, split)
    elif cfg.source == "file":
        rows = tables.read_file(key, path)
    else:
        rows = tables.read_hub(_path(cfg), cfg.subset, split)
    if not rows:
        raise UserError(f"{key}: '{path}'{'' if cfg.source == 'file' else f', split {split!r},'} has no rows")
    return dict(enumerate(rows))


def _choose(rows: Rows, count: int, rng: random.Random) -> Rows:
    return {number: rows[number] for number in sorted(rng.sample(range(len(rows)), min(count, len(rows))))}


def _hold_out(rows: Rows, count: int, key: str, columns: list[str], rng: random.Random) -> tuple[Rows, Rows]:
    def wording(row: dict[str, Any]) -> str:
        return json.dumps([value_of(row, column) for column in columns], sort_keys=True, default=str)

    held_out = _choose(rows, count, rng)
    kept = {wording(row) for row in held_out.values()}
    train = {number: row for number, row in rows.items() if wording(row) not in kept}
    if not train:
        others = len(rows) - len(held_out)
        alike = f", and the other {others} repeat a held-out prompt" if others else ""
        raise UserError(
            f"{key}: {len(held_out)} of {len(rows)} rows are held out (eval.prompts={count}){alike}, which leaves "
            "none to train on; hold out fewer or name data.eval_path or data.eval_split"
        )
    return train, held_out


def _path(cfg: DataConfig) -> str:
    if not cfg.path:
        what = "a dataset of reasoning-gym" if cfg.source == "reasoning_gym" else "a dataset on the hub"
        raise UserError(f"data.path: is missing; data.source={cfg.source} needs the name of {what}")
    return cfg.path
