"""Draw SAPO's gate beside GRPO's clip range, and say where its gradient fades.

`sapo-explain tau_pos=1 tau_neg=1.05 [gate=sigmoid] [sides=both] [clip_low=0.2] ... [out=gate.png]`, also as
`python -m sapo_rl.losses.explain`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from sapo_rl.losses.gates import GATES, find_gate, gate_value, gate_weight, half_weight_distance
from sapo_rl.losses.grpo import clipped_token_losses
from sapo_rl.losses.sapo import check_sides, check_temperatures, sapo_token_losses

USAGE = """\
usage: sapo-explain [tau_pos=1] [tau_neg=1.05] [gate=sigmoid] [sides=both] [clip_low=0.2] [clip_high=0.2] [out=gate.png]

Draw SAPO's gate beside GRPO's clip range, and say where its gradient fades."""
OTHERS = (
    "loss: SAPO is drawn beside GRPO's clip; most other losses weight a token by more than its ratio: by its "
    "probability (DPPO), its sequence (GSPO, GMPO, VESPO, CPPO) or the batch (M2PO)"
)
RATIO_SHOWN = 3.0
COLOURS = {1.0: "#1f6fb4", -1.0: "#c8502d"}


@dataclass(frozen=True)
class Settings:
    """What to explain.

    Raises:
        ValueError: a temperature or clip width out of range, an unknown gate or choice of sides.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    gate: str = "sigmoid"
    sides: str = "both"
    clip_low: float = 0.2
    clip_high: float = 0.2
    out: str = "gate.png"

    def __post_init__(self) -> None:
        check_temperatures(self.tau_pos, self.tau_neg, strict=False)
        find_gate(self.gate)
        check_sides(self.sides, "paper")
        if not (self.clip_low > 0 and self.clip_high > 0):
            raise ValueError(f"clip_low and clip_high must be above 0, found {self.clip_low} and {self.clip_high}")

    def tau(self, sign: float) -> float:
        """Return the temperature of a positive or negative advantage."""
        return self.tau_pos if sign > 0 else self.tau_neg


def parse(arguments: Sequence[str]) -> Settings:
    """Return the settings that `key=value` arguments name.

    Raises:
        ValueError: an argument of another form, an unknown key, a value of the wrong type or out of range.
    """
    defaults = {setting.name: setting.default for setting in fields(Settings)}
    chosen: dict[str, float | str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key == "loss":
            raise ValueError(OTHERS)
        if not equals or key not in defaults:
            raise ValueError(f"cannot read '{argument}'; keys: {', '.join(defaults)}")
        chosen[key] = text if isinstance(defaults[key], str) else _number(key, text)
    return Settings(**chosen)  # pyright: ignore[reportArgumentType]


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key} must be a number, found '{text}'") from None


def report(settings: Settings) -> str:
    """Return where the gradient's weight halves, its value at the clip range, and the tau to match that range."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    half_width = GATES[settings.gate].half_width
    lines = [f"gate {settings.gate}: the gradient's weight is 1 at r = 1 and 1/2 at |r - 1| = {half_width:.4g} / tau"]
    for key, sign in (("tau_pos", 1.0), ("tau_neg", -1.0)):
        tau = settings.tau(sign)
        distance = half_weight_distance(tau, settings.gate)
        at_zero, at_low, at_high = map(float, _weight(torch.tensor([0.0, low, high]), tau, settings.gate))
        above = f"r = {1 + distance:.4g}"
        below = f"r = {1 - distance:.4g}" if distance < 1 else f"never below r = 1: w(0) = {at_zero:.3f}"
        at = f"{above} and {below}"
        weights = f"w({low:g}) = {at_low:.3f}, w({high:g}) = {at_high:.3f}"
        if settings.sides == "one":
            at = above if sign > 0 else below
            weights = f"w({high:g}) = {at_high:.3f}, 1 below 1" if sign > 0 else f"w({low:g}) = {at_low:.3f}, 1 above 1"
        lines.append(f"{key}={tau:g}: weight 1/2 at |r - 1| = {distance:.4g}, {at}; {weights}")
    for key, width in (("clip_low", settings.clip_low), ("clip_high", settings.clip_high)):
        lines.append(f"to halve the weight where GRPO clips with {key}={width:g}: tau = {half_width / width:.3g}")
    return "\n".join(lines)


def draw(settings: Settings, path: str) -> None:
    """Write a PNG with gate, gradient weight and size of the push r w, each with GRPO's counterpart, to `path`.

    With one side the first panel has the objective per unit of advantage, which the gate's value alone is not.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    gate_axes, weight_axes, push_axes = figure.subplots(1, 3)
    ratio = torch.linspace(1e-3, RATIO_SHOWN, 600, dtype=torch.float64)
    for sign, name in ((1.0, "A > 0"), (-1.0, "A < 0")):
        tau, colour = settings.tau(sign), COLOURS[sign]
        label, signs = f"{name}, tau = {tau:g}", torch.full_like(ratio, sign)
        clip = clipped_token_losses(
            ratio.log(), signs, clip_low=settings.clip_low, clip_high=settings.clip_high
        ).gradient_weight
        gated = sapo_token_losses(
            ratio.log(),
            ratio.log(),
            signs,
            tau_pos=settings.tau_pos,
            tau_neg=settings.tau_neg,
            gate=settings.gate,
            sides=settings.sides,
        )
        weight = gated.gradient_weight
        gate_axes.plot(ratio, -gated.losses * signs, color=colour, label=label)
        weight_axes.plot(ratio, weight, color=colour, label=label)
        push_axes.plot(ratio, weight * ratio, color=colour, label=label)
        weight_axes.plot(ratio, clip, color=colour, linestyle=":", label=f"GRPO, {name}")
        push_axes.plot(ratio, clip * ratio, color=colour, linestyle=":", label=f"GRPO, {name}")
        if settings.sides == "both":
            value = gate_value(ratio, torch.full_like(ratio, tau), settings.gate)
            push_axes.plot(ratio, value, color=colour, linestyle="--", alpha=0.5, label=f"detached, {name}")
    one = settings.sides == "one"
    _dress(gate_axes, settings, f"{'objective per unit of advantage' if one else 'gate f(r)'} ({settings.gate})")
    _dress(weight_axes, settings, "gradient weight" if one else "gradient weight w(r) = f'(r)")
    _dress(push_axes, settings, "push on log-probability per unit of advantage")
    cast(Any, FigureCanvasAgg(figure)).print_png(path)


def _weight(ratio: Tensor, tau: float, gate: str) -> Tensor:
    return gate_weight(ratio, torch.full_like(ratio, tau), gate)


def _dress(axes: Any, settings: Settings, title: str) -> None:
    """Title, axes and clip range of one of matplotlib's `Axes`, whose methods have no whole types."""
    axes.axvspan(1 - settings.clip_low, 1 + settings.clip_high, color="0.9", label="GRPO's clip range")
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set(title=title, xlabel="ratio r", xlim=(0, RATIO_SHOWN))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and write the picture of what the command line says; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*arguments}:
        print(USAGE)
        return 0
    try:
        settings = parse(arguments)
    except ValueError as mistake:
        print(f"{mistake}\n{USAGE}", file=sys.stderr)
        return 2
    print(report(settings))
    try:
        draw(settings, settings.out)
    except OSError as mistake:
        print(f"out: '{settings.out}' cannot be written: {mistake}", file=sys.stderr)
        return 2
    print(f"drawn to {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
