"""Run folders with numbers that a test can foresee."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from samples import one_row

from sapo_rl.telemetry import Row as Told
from sapo_rl.telemetry.sinks.completions import eval_rows, rows, write_completions, write_eval_completions
from sapo_rl.telemetry.sinks.tokens import Placed, write_tokens
from sapo_rl.types import Group, Place, Prompt, Row, Sample, Stop, TokenValues, Turn

EVIL = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><!-- {{script}}"
"""What a page must show as it is."""
HALF = "\ud800"
"""Of a character: none that a page could show, but JSON takes it."""
STEPS = 20


def write_run(folder: Path, eval_rewards: list[float], **more: float) -> Path:
    """A run with an evaluation after every step; its step k has reward k / 10 and takes 2 s."""
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for step, reward in enumerate(eval_rewards):
        if step:
            times = {"time/rollout": 1.5, "time/update": 0.5, "time/step": 2.0}
            records.append({"step": step, "time": 2.0 * step, "reward/mean": step / 10, **times, **more})
        records.append({"step": step, "time": 2.0 * step, "eval/reward": reward})
    write_records(folder, records)
    return folder


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_whole_run(folder: Path, seed: int, tau: float) -> Path:
    """A run of 20 steps of 2 prompts x 3 completions with a config, evaluations, and all that can happen.

    Its step k has reward k / 100 + seed. Prompt 0 of each step is a plain text, prompt 1 an episode with a tool.
    """
    write_run(folder, [step / 40 for step in range(STEPS + 1)])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if "reward/mean" in record:
            record["reward/mean"] = record["step"] / 100 + seed
            record["rollout/engine_restarts"] = float(record["step"] >= 15)
    records.insert(12, {"step": 5, "time": 11.0, "warning": f"hot {EVIL}{HALF}"})
    (folder / "environment.json").write_text(json.dumps({"resumes": [{"date": "refused"}, {"after_step": 11}]}))
    write_records(folder, records)
    config = {"description": "apples", "loss": {"name": "sapo", "tau_neg": tau}, "seed": seed, "run_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"trainer": {"steps": STEPS}}))
    for step in range(1, STEPS + 1):
        write_completions(folder, step, step_rows(step))
    for step in (0, 10, 20):
        write_eval_completions(folder, step, held_out(step))
    write_completions(folder, STEPS + 1, step_rows(STEPS + 1))  # left from before the run was resumed
    return folder


def step_rows(step: int) -> list[Told]:
    """Rewards 0, 0.5 and 1 for each prompt; the completion of the first has so many tokens as the step's number."""
    samples = [
        one_row(
            [7] * step, stop=Stop.LENGTH, text=f"wrong {EVIL}", reward=0.0, rewards={"correct": 0.0}, advantage=-1.25
        ),
        one_row([7] * 5, text=f"half of step {step}", reward=0.5, rewards={"correct": 0.5}),
        one_row([7] * 9, text="right", reward=1.0, rewards={"correct": 1.0}, advantage=1.25),
    ]
    plain = Prompt(2 * step, [1], f"What is {step} + 1? {EVIL}", {"answer": str(step + 1), "level": "hard"})
    played = Prompt(2 * step + 1, [1], [{"role": "user", "content": "Play."}], {"answer": None})
    return [*rows(step, Group(plain, samples)), *rows(step, Group(played, [episode(step, one) for one in samples]))]


def write_some_tokens(folder: Path, step: int) -> None:
    """Of the first prompt's completions two are trained on, of the second's the first, in two rows."""
    texts = {1: "wrong ", 2: EVIL, 3: "\n", 4: "", 5: "é", 6: "sees"}

    def values(sample: int, rows: list[Row], **columns: list[float]) -> Placed:
        arrays = {name: np.array(column, np.float32) for name, column in columns.items()}
        return sample, TokenValues(Place(0, 0, sample), rows, 1.0, 0.1, arrays)

    found = [
        values(0, [Row([9], [1, 2, 3])], logps=[-0.1, -2, -8], ratio=[0.5, 1, 2], gradient_weight=[0.25, 1, 1]),
        values(2, [Row([9], [4, 5])], logps=[-1, -1], ratio=[1, 1], gradient_weight=[1, 1]),
        values(3, [Row([9], [1, 6, 1], [(0, 1)]), Row([9], [5])], logps=[-3, -4], ratio=[1, 4], gradient_weight=[1, 1]),
    ]
    write_tokens(folder, step, found, lambda ids: [texts[one] for one in ids])


def episode(step: int, sample: Sample) -> Sample:
    call = {"type": "function", "id": "call_0", "function": {"name": "look", "arguments": {"at": step}}}
    said: list[dict[str, Any]] = [
        {"role": "assistant", "content": f"Looking. {EVIL}{HALF}", "thinking": "where?", "tool_calls": [call]},
        {"role": "tool", "name": "look", "tool_call_id": "call_0", "content": "nothing there"},
        {"role": "assistant", "content": sample.text},
    ]
    opening = [{"role": "system", "content": "You have eyes."}, {"role": "user", "content": "Play."}]
    info = {"told": {"moves": 3}}
    other = [{"role": "user", "content": f"Anybody? {EVIL}"}], [{"role": "assistant", "content": f"Nobody in {step}."}]
    conversations = [other, (opening, said)] if sample.reward == 1 else []
    row = sample.rows[0]
    return one_row(
        row.token_ids,
        turns=[Turn(0, 1), Turn(1, len(row.token_ids))],
        messages=said,
        opening=opening,
        conversations=conversations,
        info=info,
        text=sample.text,
        reward=sample.reward,
        rewards=sample.rewards,
        advantage=sample.advantage,
    )


def held_out(step: int) -> list[Told]:
    """Prompt 0 is right from step 10 on, prompt 1 never; each is greedy once, and sampled twice at the end."""
    found: list[Told] = []
    for number, right in enumerate((step >= 10, False)):
        prompt = Prompt(number, [1], f"Held out {number}", {"answer": str(number)})
        one = one_row([7], text=f"{number} at {step}", rewards={"correct": float(right)})
        found += eval_rows(step, [Group(prompt, [one])], "default", "correct", greedy=True)
        if step == STEPS:
            found += eval_rows(step, [Group(prompt, [one, one])], "default", "correct", greedy=False)
    hard = Group(Prompt(0, [1], "Harder", {}), [one_row([7], text="no", rewards={"correct": 0.25})])
    return found + (eval_rows(step, [hard], "hard", "correct", greedy=True) if step else [])
