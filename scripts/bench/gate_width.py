"""Softness or width? Losses with trust regions of several widths on a small task, in minutes on a CPU.

    python scripts/bench/gate_width.py --updates 16 --seeds 4 --steps 100 --out docs/bench/gate_width.json

A policy of 10,600 weights writes six tokens for each of 32 contexts; the reward is the share of tokens that are the
context's own. Each rollout batch (32 contexts x 8) is cut into as many updates as it says, every sample in one. The
width of a loss is the |r - 1| at which a token that moves with its advantage has half of its gradient: a clip's range,
and 1.76 / tau of SAPO's gate. Nothing here is a language model: it says what can be, not what is.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from torch import Tensor, nn
from workloads import ROOT

sys.path.insert(0, str(ROOT))
from sapo_rl.losses import GATES, LossInputs, build_loss

TOKENS, LENGTH, CONTEXTS, GROUP, WIDTH = 32, 6, 32, 8, 32
HALF = GATES["sigmoid"].half_width
"""tau times the width of the sigmoid gate."""
KINDS: dict[str, dict[str, Any]] = {
    "clip": {"name": "grpo"},
    "SAPO": {"name": "sapo", "gradient": "paper"},
    "SAPO, one side": {"name": "sapo", "gradient": "paper", "sides": "one"},
    "clip, bounded": {"name": "grpo", "dual_clip": 3.0},
    "one side, bounded": {"name": "sapo", "gradient": "paper", "sides": "one", "dual_clip": 3.0},
}
WIDTHS = (1.76, 0.44, 0.2, 0.1, 0.05)
"""Of tau 1, 4, 8.8, 17.6 and 35."""


class Cell(NamedTuple):
    """One run."""

    kind: str
    width: float
    updates: int
    rate: float
    seed: int


def settings(kind: str, width: float) -> dict[str, Any]:
    """Return a loss of that width."""
    if KINDS[kind]["name"] == "grpo":
        return KINDS[kind] | {"clip_low": min(width, 1.0), "clip_high": width}
    return KINDS[kind] | {"tau_pos": HALF / width, "tau_neg": HALF / width}


class Writer(nn.Module):
    """Gives each token from the context, its place and the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.place = nn.Embedding(CONTEXTS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.before = nn.Embedding(TOKENS + 1, WIDTH)
        self.rest = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, TOKENS))

    def forward(self, contexts: Tensor, place: Tensor, before: Tensor) -> Tensor:
        """Return log-probabilities `(..., TOKENS)`."""
        return self.rest(self.context(contexts) + self.place(place) + self.before(before)).log_softmax(-1)

    def logps(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-probability `(N, LENGTH)` of each of the tokens `(N, LENGTH)`."""
        before = torch.cat([torch.full((len(tokens), 1), TOKENS), tokens[:, :-1]], 1)
        all_logps = self(contexts[:, None], torch.arange(LENGTH), before)
        return all_logps.gather(-1, tokens[..., None])[..., 0]

    @torch.no_grad()
    def write(self, contexts: Tensor, chance: torch.Generator) -> Tensor:
        """Sample `(N, LENGTH)` tokens."""
        written = [torch.full((len(contexts),), TOKENS)]
        for place in range(LENGTH):
            logps = self(contexts, torch.tensor(place), written[-1])
            written.append(torch.multinomial(logps.exp(), 1, generator=chance)[:, 0])
        return torch.stack(written[1:], 1)


def learn(cell: Cell, steps: int) -> float:
    """Train; return the mean reward of the last five batches."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    chance = torch.Generator().manual_seed(cell.seed)
    wanted = torch.randint(TOKENS, (CONTEXTS, LENGTH), generator=chance)
    writer, loss = Writer(), build_loss(**settings(cell.kind, cell.width))
    optimizer = torch.optim.AdamW(writer.parameters(), lr=cell.rate, weight_decay=0.0)
    contexts, rewards = torch.arange(CONTEXTS).repeat_interleave(GROUP), list[float]()
    for _ in range(steps):
        tokens = writer.write(contexts, chance)
        old = writer.logps(contexts, tokens).detach()
        right = (tokens == wanted[contexts]).float().mean(1).view(CONTEXTS, GROUP)
        rewards.append(right.mean().item())
        advantages = ((right - right.mean(1, keepdim=True)) / (right.std(1, keepdim=True) + 1e-6)).flatten()
        for part in torch.randperm(CONTEXTS, generator=chance).chunk(cell.updates):
            rows = (part[:, None] * GROUP + torch.arange(GROUP)).flatten()
            logps = writer.logps(contexts[rows], tokens[rows]).flatten()
            count = len(logps)
            inputs = LossInputs(
                logps=logps,
                old_logps=old[rows].flatten(),
                advantages=advantages[rows].repeat_interleave(LENGTH),
                sequence_ids=torch.arange(len(rows)).repeat_interleave(LENGTH),
                num_sequences=len(rows),
                token_weights=torch.full((count,), 1 / count),
            )
            optimizer.zero_grad()
            loss(inputs).loss.backward()
            nn.utils.clip_grad_norm_(writer.parameters(), 1.0)
            optimizer.step()
    return statistics.fmean(rewards[-5:])


def summary(found: dict[Cell, float]) -> list[dict[str, Any]]:
    """Return mean and standard error over seeds of each loss, width and number of updates, at its best rate."""
    rows = []
    for kind, width, updates in dict.fromkeys((cell.kind, cell.width, cell.updates) for cell in found):
        own = {cell: value for cell, value in found.items() if cell[:3] == (kind, width, updates)}
        by_rate = {rate: [v for cell, v in own.items() if cell.rate == rate] for rate in {cell.rate for cell in own}}
        rate, values = max(by_rate.items(), key=lambda one: statistics.fmean(one[1]))
        error = statistics.stdev(values) / len(values) ** 0.5
        rows.append(
            {"loss": kind, "width": width, "updates": updates, "rate": rate, "mean": statistics.fmean(values)}
            | {"error": error, "values": values}
        )
    return rows


def table(rows: list[dict[str, Any]], updates: list[int], note: str) -> dict[str, Any]:
    """Return the means as a table of texts: a row for each width, a column for each loss and number of updates."""
    columns = ["width", "tau", *(f"{kind}, {count} updates" for count in updates for kind in KINDS)]
    texts = {
        (row["loss"], row["width"], row["updates"]): f"{row['mean']:.3f} ± {row['error']:.3f} ({row['rate']:g})"
        for row in rows
    }
    lines = [
        [f"{width:g}", f"{HALF / width:.1f}", *(texts[kind, width, count] for count in updates for kind in KINDS)]
        for width in sorted({row["width"] for row in rows}, reverse=True)
    ]
    return {"columns": columns, "rows": lines, "note": note}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, nargs="+", default=[4, 16], help="updates on each batch")
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates; the best counts")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    return parser.parse_args()


def main() -> None:
    """Run all cells and write what they learnt."""
    args = arguments()
    crossed = itertools.product(KINDS, args.widths, args.updates, args.rates, range(args.seeds))
    cells = [Cell._make(one) for one in crossed]
    with ProcessPoolExecutor() as pool:
        found = dict(zip(cells, pool.map(learn, cells, itertools.repeat(args.steps)), strict=True))
    rows = summary(found)
    note = (
        f"Mean reward of the last five of {args.steps} batches, over {args.seeds} seeds ± standard error, at the best "
        f"of the learning rates {', '.join(f'{rate:g}' for rate in args.rates)} (in brackets)."
    )
    report.write(args.out, {**report.facts(), "cells": rows, "table": table(rows, args.updates, note)})
    print(report.markdown(table(rows, args.updates, note)))


if __name__ == "__main__":
    main()
