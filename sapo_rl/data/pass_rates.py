"""How often prompts are solved: the pass rates of a run, what they are worth to draw a prompt, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from sapo_rl.config.data import BY_PASS_RATE, DataConfig, PassRateConfig
from sapo_rl.data.tables import read_file, write_table
from sapo_rl.errors import UserError, did_you_mean
from sapo_rl.errors.files import expand, is_folder
from sapo_rl.run_folder import PASS_RATES
from sapo_rl.types import Group, Messages, PassRate

COLUMNS = ("fingerprint", "pass_rate", "samples")
"""What a file of pass rates holds at least, a row a prompt."""
KEY = "data.pass_rate.path"
"""The key that names such a file."""

Array: TypeAlias = NDArray[Any]


def pass_rate(rewards_G: Iterable[float | None], solved_at: float) -> float | None:
    """Return the share of a prompt's samples whose reward is at least `solved_at`; None where none has a reward.

    Example:
        >>> pass_rate([1.0, 0.0, None, 1.0, 0.0], solved_at=1.0)
        0.5
    """
    known = [reward for reward in rewards_G if reward is not None]
    return sum(reward >= solved_at for reward in known) / len(known) if known else None


def pass_rates_of(groups: Sequence[Group], reward: str, solved_at: float) -> list[float | None]:
    """Return the pass rate of each scored group by the reward of that name.

    Raises:
        UserError: no function returns it.
    """
    known = {name for group in groups for sample in group.samples for name in sample.rewards}
    if known and reward not in known:
        raise UserError(f"data.pass_rate.reward: no function returns '{reward}'; {did_you_mean(reward, known)}")
    return [pass_rate((sample.rewards.get(reward) for sample in group.samples), solved_at) for group in groups]


def worth(rates: Array, target: float) -> Array:
    """Return what prompts of these pass rates are worth: 1 at `target`, 0 where none or all samples are solved.

    (p / t)^(2t) ((1 - p) / (1 - t))^(2(1 - t)) for a rate p and a target t. At t = 0.5 it is 4 p (1 - p), the
    learnability of a prompt (arXiv 2502.12272), the variance of its rewards; for other targets the same with its
    maximum moved there. A rate that is not known (NaN) is worth 1.

    Args:
        rates: (N,) float64 from 0 to 1, or NaN.
        target: above 0 and below 1.
    """
    found = (rates / target) ** (2 * target) * ((1 - rates) / (1 - target)) ** (2 * (1 - target))
    return np.where(np.isnan(rates), 1.0, found)


def skipped(rates: Array, samples: Array, settings: PassRateConfig) -> Array:
    """Return (N,) bool: the prompts that `low` and `high` hold back, once they are known well enough."""
    low = -1.0 if settings.low is None else settings.low
    high = 2.0 if settings.high is None else settings.high
    return (samples >= settings.min_samples) & ((rates <= low) | (rates >= high))


class PassRates:
    """The pass rates of the prompts of a run, the same on all ranks.

    The rate of a prompt is the mean of its last two groups. What the draw of a step may know does not depend on what
    is ready first: the results of all steps up to `lag` steps before the last one, as many as are drawn ahead. So a
    resumed run draws as it would have.

    Args:
        count: prompts.
        cfg: what they are worth.
        lag: batches that are begun beyond the one that is trained on.

    Example:
        >>> rates = PassRates(3, DataConfig(sampling="pass_rate"))
        >>> rates.record(1, [PassRate(0, 1.0, samples=4), PassRate(1, 0.25, samples=4)])
        >>> rates.at(2)
        (array([1.  , 0.25,  nan]), array([4, 4, 0]))
        >>> rates.weights(2)
        array([0.05, 0.75, 1.  ])
    """

    def __init__(self, count: int, cfg: DataConfig, lag: int = 0) -> None:
        self._cfg, self._lag = cfg, lag
        self._last, self._before = np.full(count, np.nan), np.full(count, np.nan)
        self._samples = np.zeros(count, np.int64)
        self._coming: dict[int, list[PassRate]] = {}
        """Results by step that a draw to come may not know yet."""

    def record(self, step: int, results: Sequence[PassRate]) -> None:
        """Take down the results of a step, whose batch is the next to be trained on."""
        self._coming[step] = [*results]
        for done in [one for one in self._coming if one <= step - self._lag]:
            _enter(self._coming.pop(done), self._last, self._before, self._samples)

    def begin_with(self, results: Sequence[PassRate]) -> None:
        """Start from what was measured before the run."""
        _enter(results, self._last, self._before, self._samples)

    def at(self, step: int | None = None) -> tuple[Array, Array]:
        """Return the rates, (N,) float64 with NaN where nothing is known, and the samples that they come from, (N,).

        Args:
            step: that are known to the draw of this step; None stands for all.
        """
        last, before, samples = self._last.copy(), self._before.copy(), self._samples.copy()
        for done in sorted(self._coming):
            if step is None or done < step - self._lag:
                _enter(self._coming[done], last, before, samples)
        return (last + before) / 2, samples

    def weights(self, step: int | None = None) -> Array:
        """Return (N,) float64, for each prompt what its chance to be drawn is proportional to, as `at` knows it.

        With `data.sampling=pass_rate` it is what the prompt is worth, else 1; where the filter holds it back, 0; and
        never less than `data.pass_rate.floor`.
        """
        return self._weighed(*self.at(step))

    def _weighed(self, rates: Array, samples: Array) -> Array:
        settings = self._cfg.pass_rate
        found = worth(rates, settings.target) if self._cfg.sampling == BY_PASS_RATE else np.ones(len(rates))
        return np.maximum(np.where(skipped(rates, samples, settings), 0.0, found), settings.floor)

    def metrics(self) -> dict[str, float]:
        """Return `data/effective_prompts` and `data/known_fraction`, and of known prompts their mean rate and its ends.

        With weights w the effective number of prompts is (sum w)^2 / sum w^2: all of them where w is the same.
        """
        rates, samples = self.at()
        known, weights = rates[samples > 0], self._weighed(rates, samples)
        found = {
            "data/effective_prompts": float(weights.sum() ** 2 / (weights**2).sum()),
            "data/known_fraction": len(known) / len(rates),
        }
        if len(known):
            found["data/pass_rate_mean"] = float(known.mean())
            found["data/always_solved_fraction"] = float((known == 1).mean())
            found["data/never_solved_fraction"] = float((known == 0).mean())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, as JSON knows it: of prompts of which something is known."""
        known = np.flatnonzero(self._samples)
        found = {"last": self._last, "before": self._before, "samples": self._samples}
        return {
            "positions": known.tolist(),
            **{name: values[known].tolist() for name, values in found.items()},
            "coming": {str(step): results for step, results in self._coming.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, of the same prompts."""
        known = state["positions"]
        for name, values in (("last", self._last), ("before", self._before), ("samples", self._samples)):
            values[known] = state[name]
        self._coming = {int(step): [PassRate(*one) for one in results] for step, results in state["coming"].items()}


def _enter(results: Iterable[PassRate], last: Array, before: Array, samples: Array) -> None:
    for position, rate, count in results:
        before[position] = last[position] if samples[position] else rate
        last[position] = rate
        samples[position] += count


def fingerprint(content: str | Messages) -> str:
    """Return what tells a prompt from others whatever its place in the data: a checksum of what the model is asked."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def write_pass_rates(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as a Parquet file; whole or not at all."""
    import pyarrow

    write_table(path, pyarrow.table(dict(columns)))


def located(path: str) -> str:
    """Return the path of the file of pass rates where that of a run's or a check's folder is given."""
    return str(expand(path) / PASS_RATES) if is_folder(path) else path


def read_pass_rates(path: str, contents: Sequence[str | Messages]) -> list[PassRate]:
    """Return what a file, or the one in a run's or a check's folder, says of prompts, whatever their order there.

    Args:
        path: of the file or folder.
        contents: what the model is asked, of each prompt to train on.

    Raises:
        UserError: there is no such file, it holds no pass rates, or none of these prompts.
    """
    rows = {row.get("fingerprint"): row for row in read_file(KEY, located(path))}
    for row in rows.values():
        rate, samples = row.get("pass_rate"), row.get("samples")
        if not (isinstance(rate, int | float) and 0 <= rate <= 1 and isinstance(samples, int) and samples > 0):
            raise UserError(
                f"{KEY}: '{path}' holds no pass rates (columns {', '.join(COLUMNS)}); take what check=data or a run "
                "has written"
            )
    places = enumerate(map(fingerprint, contents))
    found = [PassRate(place, rows[mark]["pass_rate"], rows[mark]["samples"]) for place, mark in places if mark in rows]
    if not found:
        raise UserError(f"{KEY}: '{path}' knows none of the {len(contents):,} prompts to train on")
    return found
