"""The benches: what they count, the random models of workload b, and a tiny comparison on the CPU."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import forked
import pytest
import torch
import yaml
from inside import sapo_train
from tiny import PLAIN, make_workspace

from sapo_rl.engines import child_process
from sapo_rl.losses import build_loss

BENCH = Path(__file__).resolve().parents[1] / "scripts/bench"
sys.path.insert(0, str(BENCH))

import episodes  # noqa: E402
import gate_width  # noqa: E402
import judge  # noqa: E402
import large_report  # noqa: E402
import recipe  # noqa: E402
import report  # noqa: E402
import sandbox  # noqa: E402
import scaling  # noqa: E402
import study  # noqa: E402
import study_results  # noqa: E402
import vs_trl  # noqa: E402
import workloads  # noqa: E402


def cycle(seconds: float, tokens: int, **more: float) -> dict[str, object]:
    phases = dict.fromkeys(vs_trl.PHASES, 0.0) | {"rollout": seconds / 2, "update": seconds / 2}
    return {"seconds": seconds, "tokens": tokens, "phases": phases, **more}


def test_summary_leaves_the_warm_up_out_and_weighs_tokens_by_time() -> None:
    cycles = [cycle(100, 1), cycle(1, 100, peak_memory_gib=2.0), cycle(3, 100, peak_memory_gib=3.0), cycle(2, 100)]
    found = vs_trl.summary(cycles, warm_up=1)
    assert found["cycles"] == 3
    assert (found["cycle_seconds"], found["cycle_seconds_min"], found["cycle_seconds_max"]) == (2, 1, 3)
    assert found["tokens_per_second"] == pytest.approx(300 / 6)
    assert found["phases"]["rollout"] == pytest.approx(1.0)
    assert found["peak_memory_gib"] == 3.0
    assert "parity" not in found


def test_summary_of_too_few_cycles_is_empty_and_shown_as_the_error() -> None:
    assert vs_trl.summary([cycle(1, 1)], warm_up=1) == {}
    shown = vs_trl.table({"TRL": {"summary": {}, "error": "exit code 1"}}, "A note.")
    assert shown["rows"][0][:2] == ["TRL", "exit code 1"]
    assert len(shown["rows"][0]) == len(shown["columns"])


def test_table_states_the_speed_up_in_tokens_a_second() -> None:
    programs = {
        "TRL": {"summary": vs_trl.summary([cycle(4, 100)], 0)},
        "sapo-train": {"summary": vs_trl.summary([cycle(1, 100)], 0)},
    }
    assert "4.00 times" in vs_trl.table(programs, "")["note"]


def test_cycles_of_a_run_folder_account_for_all_of_the_time() -> None:
    records = [
        {"step": 0, "mismatch/probe_logp_diff": 0.5},
        {
            "step": 1,
            "time/step": 10.0,
            "time/rollout": 4.0,
            "time/update": 5.0,
            "perf/completion_tokens": 70.0,
            "perf/peak_memory_gib": 1.5,
        },
        {"step": 1, "mismatch/probe_logp_diff": 0.25},
    ]
    (found,) = vs_trl.our_cycles(records)
    assert found["phases"] == {
        "rollout": 4.0, "sync": 0.0, "reward": 0.0, "old_logps": 0.0, "update": 5.0, "other": 1.0
    }  # fmt: skip
    assert (found["tokens"], found["peak_memory_gib"], found["parity"]) == (70.0, 1.5, 0.25)


@pytest.mark.parametrize("ahead", [1, 2])
def test_overlapped_cycles_count_their_wait_and_end_before_those_that_write_less(ahead: int) -> None:
    records = [
        {
            "step": step,
            "time/step": 5.0,
            "time/rollout": 4.0,
            "time/reward": 0.25,
            "time/update": 3.0,
            "rollout/staleness": float(min(ahead, step - 1)),
            "perf/completion_tokens": 70.0,
        }
        for step in (1, 2, 3)
    ]
    cycles = vs_trl.our_cycles(records)
    assert len(cycles) == 3 - ahead
    assert cycles[0]["phases"]["other"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", list(workloads.WORKLOADS))
def test_peer_takes_the_wanted_updates_on_every_rollout_batch(name: str, tmp_path: Path) -> None:
    workload = workloads.WORKLOADS[name]
    task = vs_trl.Task(workload, tmp_path, [], cycles=3, folder=tmp_path, limit=1.0)
    for batch in workload.peer_batches:
        arguments = vs_trl.peer_arguments(task, batch)
        accumulation, per_generation = arguments["gradient_accumulation_steps"], arguments["steps_per_generation"]
        assert batch * per_generation == workload.samples
        assert accumulation * workload.updates == per_generation
        assert arguments["max_steps"] == 3 * workload.updates


def test_prompts_are_distinct_over_a_whole_bench() -> None:
    rows = workloads.chat_rows(128 * 6)
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows)
    assert rows == workloads.chat_rows(128 * 6)


def test_reward_is_the_share_of_vowels_of_texts_and_chats() -> None:
    assert workloads.vowel_share(["abcd", "", [{"role": "assistant", "content": "aeio"}]]) == [0.25, 0.0, 1.0]


def test_random_model_ends_geometrically_and_knows_no_foreign_token(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workloads.make_model(workloads.SHAPES["tiny"], tiny_model, 16.0, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.randint(len(tokenizer), (4, 300), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        probabilities = model(tokens).logits.softmax(-1)  # (4, 300, vocabulary)
    ends = probabilities[..., tokenizer.eos_token_id]
    assert ends.mean().item() == pytest.approx(1 / 16, rel=0.05)
    assert ends.std().item() < 0.1 / 16
    assert probabilities[..., len(tokenizer) :].max().item() < 1e-6


def test_a_recipes_table_has_a_row_for_each_evaluation_and_the_curve_every_step() -> None:
    steps = [
        {"step": step, "time": 10.0 * step, "reward/mean": step / 4, "tools/call_frequency": 2.0} for step in (1, 2)
    ]
    evaluations = [{"step": step, "time": 10.5 * step, "eval/reward": step / 3} for step in (0, 2)]
    records: list[dict[str, Any]] = [evaluations[0], *steps, evaluations[1], {"step": 2, "time": 22.0, "warning": "no"}]
    told = recipe.table(records, ["tools/call_frequency", "none"], "A note.")
    assert told["columns"] == ["step", "seconds", "eval/reward", "tools/call_frequency", "none"]
    assert told["rows"] == [["0", "0", "0.000", "2.00", ""], ["2", "21", "0.667", "2.00", ""]]
    several = [one | {"eval/rewards/f1": 0.5, "eval/rewards/exact": 0.25} for one in evaluations]
    assert recipe.table(several, [], "")["rows"][1] == ["2", "21", "0.250", "0.500"]
    assert recipe.table(several, [], "", ["eval/reward"])["rows"][1] == ["2", "21", "0.667"]
    assert recipe.curve(records, ["tools/call_frequency"]) == steps


def test_what_sapo_eval_has_found_is_a_row_for_each_model_and_set() -> None:
    estimates = {"reward": {"value": 0.25, "low": 0.125, "high": 0.5, "prompts": 8}}
    found = {"estimates": estimates, "metrics": {"eval/sums/mean_length": 12.4, "eval/sums/clipped_ratio": 0.125}}
    told = recipe.measured({"models": [{"model": "tiny", "sets": {"sums": found}}]}, "A note.")
    assert told["rows"] == [["tiny", "sums", "8", "reward", "0.250 [0.125, 0.500]", "12", "0.125"]]
    assert len(told["columns"]) == len(told["rows"][0])


def test_report_fills_a_page_and_says_what_is_missing(tmp_path: Path) -> None:
    page = "<!-- bench: one -->\nold\n<!-- end -->\ntext\n<!-- bench: two -->\n<!-- end -->\n"
    table = {"columns": ["a", "b"], "rows": [["1", "2"]], "note": "A note."}
    facts = {"date": "2026-01-01", "device": "a GPU", "commit": "abc", "versions": {"torch": "2.0"}}
    report.write(tmp_path / "one.json", {**facts, "table": table})
    filled = report.fill(page, tmp_path)
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |\n\nA note." in filled
    assert "2026-01-01, a GPU, commit abc, torch 2.0" in filled
    assert "old" not in filled
    assert filled.count("Not measured yet.") == 1
    assert report.fill(filled, tmp_path) == filled


@pytest.fixture
def main_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a bench in this process; the runs and engines that it starts are forked."""
    stop = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(vs_trl, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": forked.Popen}))
    monkeypatch.setattr(child_process, "subprocess", child_process.subprocess)
    forked.take_engines()

    def run(bench: ModuleType, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(bench.__file__), *arguments])
        bench.main()

    yield run
    signal.signal(signal.SIGTERM, stop)


@pytest.mark.e2e
def test_tiny_comparison_measures_our_half(
    main_of: Callable[..., None],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "result.json"
    make_workspace(tmp_path, tiny_model)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sizes = ["--model", str(tiny_model), "--warm-up", "1", "--cycles", "2", "--overlap", "--out", str(out)]
    overrides = ["--set", "model.dtype=float32", PLAIN]
    main_of(vs_trl, "--workload", "tiny", "--shape", "tiny", "--skip-trl", *sizes, *overrides)
    programs = json.loads(out.read_text())["programs"]
    assert not [program["log_tail"] for program in programs.values() if "error" in program]
    assert programs["sapo-train with overlap"]["summary"]["cycles"] == 1
    program = programs["sapo-train"]
    assert len(program["cycles"]) == 3
    assert program["summary"]["cycles"] == 2
    assert 16 <= program["summary"]["tokens_per_cycle"] <= 16 * 16
    assert program["summary"]["parity"] < 1e-3
    assert "| sapo-train, 2 cycles |" in capsys.readouterr().out


@pytest.mark.e2e
def test_episodes_are_measured_beside_one_turn(
    main_of: Callable[..., None], forked_workers: None, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    sizes = ["--set", "8:eager:1", "--replies", "4", "--workers", "1", "--out", str(out)]
    main_of(episodes, "--workload", "tiny", "--model", str(tiny_model), *sizes)
    one, several = json.loads(out.read_text())["measurements"]
    assert 16 <= one["tokens"] <= 16 * 16 and "turns" not in one
    assert several["turns"] == 4 and 16 * 4 <= several["tokens"] <= 16 * 4 * 4
    assert several["forks"] == 0 and 0 < several["prefix_hit"] < 1


def test_kernels_are_summed_by_kind_and_the_rest_is_named() -> None:
    kernels = [("nvjet_sm90_tst", 0.4), ("pytorch_flash::flash_fwd", 0.2), ("nvjet_sm90_tss", 0.1), ("unheard_of", 0.1)]
    one = {"size": "1b", "kernels": [{"kernel": name, "share": share} for name, share in kernels]}
    table = report.kernel_kinds({"measured": [one, {"size": "2b"}]})
    shown = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert len(table["rows"]) == 1
    assert (shown["size"], shown["matrix products"], shown["attention"]) == ("1b", "50%", "20%")
    assert (shown["optimiser"], shown["the rest"]) == ("", "30%")


def test_efficiency_is_tokens_a_second_of_each_gpu_against_the_fewest() -> None:
    def of(gpus: int, seconds: float, tokens: int) -> dict[str, object]:
        return {
            "gpus": gpus,
            "launch": "ddp",
            "summary": vs_trl.summary([cycle(seconds, tokens, peak_memory_gib=1)], 0),
        }

    runs = [of(1, 2, 100), of(2, 2, 180), {"gpus": 4, "launch": "ddp", "summary": {}, "error": "exit code 2"}]
    table = scaling.table(runs, "")
    assert [row[table["columns"].index("efficiency")] for row in table["rows"][:2]] == ["100%", "90%"]
    assert table["rows"][2][2] == "exit code 2" and len(table["rows"][2]) == len(table["columns"])


GRID = {
    "config": "tiny.yaml",
    "settings": ["trainer.steps=6"],
    "losses": {"clip": ["loss=grpo"], "one": ["loss=sapo", "loss.sides=one"]},
    "axes": {"trainer.updates_per_rollout": [4, 16]},
    "seeds": [0, 1],
}


def made_up_run(folder: Path, cell: study.Cell, accuracies: list[float], steps: int = 6, **numbers: float) -> None:
    """A run folder as a cell leaves it, an evaluation every second step, ten seconds each."""
    run = folder / cell.name / "runs/tiny/2026-01-01_00-00-00"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"trainer: {{steps: {steps}}}\n")
    records: list[dict[str, object]] = []
    for step in range(2 * len(accuracies) - 1):
        if step:
            of_step = {"time": 10.0 * step, "policy/loss": 0.1, "time/step": 9.0, "warning": "a text"}
            records.append({"step": step, **of_step, **numbers})
        if step % 2 == 0:
            records.append({"step": step, "time": 10.0 * step + 1, "eval/reward": accuracies[step // 2]})
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records) + '{"step": 99, "half wri')


def test_a_grid_runs_every_loss_of_the_first_seed_first() -> None:
    cells = study.plan(GRID, ["model.path=m"])
    assert len(cells) == len({cell.name for cell in cells}) == 8
    assert [(cell.seed, cell.axes["trainer.updates_per_rollout"], cell.loss) for cell in cells[:5]] == [
        (0, 4, "clip"), (0, 4, "one"), (0, 16, "clip"), (0, 16, "one"), (1, 4, "clip")
    ]  # fmt: skip
    assert cells[3].overrides == (
        "config=tiny.yaml", "trainer.steps=6", "trainer.updates_per_rollout=16", "loss=sapo", "loss.sides=one",
        "seed=0", "model.path=m",
    )  # fmt: skip
    assert not any("=" in cell.name or "/" in cell.name for cell in cells)  # they are part of an override's value
    for wrong, word in (({"taus": [1]}, "'taus'"), ({"losses": None}, "losses")):
        with pytest.raises(ValueError, match=word):
            study.plan({key: value for key, value in (GRID | wrong).items() if value is not None})


def test_a_run_has_collapsed_after_two_evaluations_below_a_third_of_its_best() -> None:
    def at(*accuracies: float) -> int | None:
        return study_results.collapsed_at([{"step": n, "eval/reward": value} for n, value in enumerate(accuracies)])

    assert at(0.2, 0.6, 0.19, 0.19, 0.5) == 3
    assert at(0.2, 0.6, 0.19, 0.21, 0.19) is None
    assert at(0.09, 0.0, 0.0, 0.0) is None  # too little to lose
    assert study_results.collapsed_at([{"step": 1, "policy/loss": 0.1}, {"step": 2, "policy/loss": None}]) == 2
    assert study_results.collapsed_at([{"step": 1, "policy/loss": 0.1, "policy/grad_norm": None}]) == 1


def test_results_of_a_grid_have_a_row_a_step_and_means_over_seeds(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    grid = GRID | {"axes": {"trainer.updates_per_rollout": [4]}}
    cells = study.plan(grid)
    curves = {"clip": ([0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.7]), "one": ([0.2, 0.6, 0.1, 0.1], [0.2, 0.3])}
    for cell in cells:
        made_up_run(tmp_path, cell, curves[cell.loss][cell.seed], **{"policy/ratio_max": 2.0 + cell.seed})
    ends = {"clip": ("complete", "complete"), "one": ("collapsed", None)}
    for cell in cells:
        if how := ends[cell.loss][cell.seed]:
            (tmp_path / cell.name / "outcome.json").write_text(json.dumps({"outcome": how}))
    result = study.collect(cells, tmp_path, tmp_path / "out/study.json", grid)

    assert json.loads((tmp_path / "out/study.json").read_text()) == result
    assert [one["outcome"] for one in result["cells"]] == ["complete", "collapsed", "complete", "unfinished"]
    assert result["cells"][0]["curve"] == [[0, 0.0, 0.2], [2, 18.0, 0.3], [4, 36.0, 0.4], [6, 54.0, 0.5]]
    clip, one = ({**dict(zip(result["table"]["columns"], row, strict=True))} for row in result["table"]["rows"])
    assert (clip["loss"], clip["updates_per_rollout"], clip["seeds"], clip["collapsed"]) == ("clip", "4", "2", "")
    assert (clip["accuracy at the end"], clip["ratio max"]) == ("0.600 ± 0.100", "2.50 ± 0.50")
    assert (clip["at equal time"], one["at equal time"]) == ("0.600 ± 0.100 at 54 s", "0.100 at 54 s")
    assert (one["seeds"], one["accuracy at the end"], one["best"], one["collapsed"]) == ("1", "0.100", "0.600", "1")

    rows = pq.read_table(tmp_path / "out/study.parquet").to_pylist()
    assert len(rows) == 7 + 7 + 7 + 3
    assert {row["cell"] for row in rows} == {cell.name for cell in cells}
    lost = [row["step"] for row in rows if row["collapsed"]]
    assert lost == [6]
    last = rows[6]
    assert (last["step"], last["time"], last["eval/reward"], last["policy/ratio_max"]) == (6, 61.0, 0.5, 2.0)
    assert (last["seconds"], rows[0]["seconds"]) == (54.0, 0.0)
    assert rows[0]["policy/ratio_max"] is None and "warning" not in last


def test_a_cell_is_complete_with_the_evaluation_after_its_last_step(tmp_path: Path) -> None:
    first, second, *_ = study.plan(GRID)
    made_up_run(tmp_path, first, [0.1] * 4)
    made_up_run(tmp_path, second, [0.1] * 3)
    done = [study.is_complete(tmp_path / cell.name, study.records_of(tmp_path / cell.name)) for cell in (first, second)]
    assert done == [True, False]
    assert not study.is_complete(tmp_path / "absent", [])


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

arguments = dict(one.split("=", 1) for one in sys.argv[1:])
resumed = arguments.get("resume")
run = Path(resumed or "runs/tiny/one")
run.mkdir(parents=True, exist_ok=True)
kind = (run / "kind").read_text() if resumed else arguments["kind"]
(run / "kind").write_text(kind)
(run / "config.yaml").write_text("trainer: {steps: 4}")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
done = len(list(run.glob("checkpoints/*")))
for step in range(done, 5):
    if kind == "slow" and not resumed and step == 2:
        while not stop:
            time.sleep(0.05)
        (run / "checkpoints/step_1").mkdir(parents=True)
        (run / "checkpoints/step_2").mkdir()
        sys.exit(130)
    if kind == "fails":
        sys.exit("no such thing")
    accuracy = 0.6 if step == 0 or kind != "falls" else 0.1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": float(step), "eval/reward": accuracy}) + "\\n")
    if kind == "falls" and step == 2:
        while not stop:
            time.sleep(0.05)
        sys.exit(130)
"""


def test_a_grid_stops_what_has_collapsed_and_goes_on_where_it_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(study, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
    monkeypatch.setattr(study, "WORTH_STARTING", 0.0)
    monkeypatch.setattr(study, "cards", lambda: [None])
    kinds = ["good", "falls", "fails", "slow"]
    cells = study.plan({"config": "x", "losses": {kind: [f"kind={kind}"] for kind in kinds}})

    def run(seconds: float, retry: bool = False, among: list[study.Cell] = cells) -> tuple[list[str], list[str]]:
        left = study.unfinished(among, tmp_path, retry)
        study.run_all(left, tmp_path, 2, 200.0, time.monotonic() + seconds, lambda: None)
        return [cell.loss for cell in left], [study.outcome(tmp_path / cell.name) for cell in cells]

    assert run(300, among=cells[:3])[1] == ["complete", "collapsed", "failed", "unfinished"]
    assert run(study.CLOSING + 15) == (["slow"], ["complete", "collapsed", "failed", "unfinished"])
    assert run(300) == (["slow"], ["complete", "collapsed", "failed", "complete"])
    steps = [record["step"] for record in study.records_of(tmp_path / cells[3].name)]
    assert steps == [0, 1, 2, 3, 4]  # not begun anew
    assert run(300, retry=True) == (["fails"], ["complete", "collapsed", "failed", "complete"])
    assert run(300) == ([], ["complete", "collapsed", "failed", "complete"])


def tiny_task(folder: Path) -> vs_trl.Task:
    return vs_trl.Task(workloads.WORKLOADS["tiny"], folder, [], cycles=3, folder=folder, limit=60.0)


def test_a_run_that_fails_early_does_not_show_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tmp_path)
    step, codes = {"step": 1, "time/step": 5.0, "perf/completion_tokens": 70.0}, iter([0, 2])

    def run(command: list[str], log: Path, limit: float) -> int:
        log.write_text("said\n")
        (folder,) = [Path(argument.removeprefix("run_dir=")) for argument in command if argument.startswith("run_dir=")]
        if (code := next(codes)) == 0:
            (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        return code

    monkeypatch.setattr(vs_trl, "run", run)
    assert len(vs_trl.run_ours(task, None, [])["cycles"]) == 1
    failed = vs_trl.run_ours(task, None, [])
    assert (failed["cycles"], failed["error"]) == ([], "exit code 2")


CUT_SHORT = """#!/bin/sh
for argument; do case $argument in run_dir=*) run=${argument#run_dir=};; esac; done
echo '{"step": 1, "time/step": 5.0, "perf/completion_tokens": 70.0, "perf/peak_memory_gib": 1.0}' > $run/metrics.jsonl
echo said
until [ -e go ]; do sleep 0.1; done
kill -TERM $PPID
sleep 600
"""


@pytest.mark.parametrize("bench", [vs_trl, scaling])
def test_what_a_bench_has_found_when_it_is_to_end_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: ModuleType
) -> None:
    (program := tmp_path / "program").write_text(CUT_SHORT)
    program.chmod(0o700)

    class Waited(subprocess.Popen[bytes]):
        """Lets the program go on once it is waited for."""

        def wait(self, timeout: float | None = None) -> int:
            if self.args[0] == str(program):  # pyright: ignore[reportIndexIssue]
                (tmp_path / "go").touch()
            return super().wait(timeout)

    monkeypatch.setattr(vs_trl.subprocess, "Popen", Waited)
    options = {vs_trl: ["--skip-trl", "--overlap"], scaling: ["--gpus", "1", "2"]}[bench]
    monkeypatch.setattr(sys, "argv", ["bench", "--warm-up", "0", "--out", str(tmp_path / "out/a.json"), *options])
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(bench, "prepare", lambda *_, **__: tiny_task(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            bench.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM
    written = json.loads((tmp_path / "out/a.json").read_text())
    (found,) = written["programs"].values() if bench is vs_trl else written["runs"]
    assert (len(found["cycles"]), found["error"], found["log_tail"]) == (1, "cut short", ["said"])


def test_a_log_is_that_of_one_run(tmp_path: Path) -> None:
    for word in ("first", "second"):
        assert vs_trl.run([sys.executable, "-c", f"print({word!r})"], tmp_path / "log", 60.0) == 0
    assert (tmp_path / "log").read_text() == "second\n"


STUBBORN = """
import signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import workloads
listener = socket.create_server(("127.0.0.1", int(sys.argv[-1])))
time.sleep(600)
"""


def test_servers_import_the_reward_and_are_gone_when_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "sapo_rl.run.serve"]
        started.append(popen([sys.executable, str(tmp_path / "stubborn.py"), *command[3:]], **how))
        return started[-1]

    monkeypatch.setattr(scaling.subprocess, "Popen", start)
    monkeypatch.setattr(scaling, "END_SECONDS", 0.5)
    with scaling.serving(tiny_task(tmp_path), 1, 2, []) as overrides:
        assert [one.poll() for one in started] == [None, None]
    assert [one.returncode for one in started] == [-9, -9]
    (servers,) = overrides
    assert servers.startswith("rollout.servers=[127.0.0.1:") and servers.count(":") == 2


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    command = [sys.executable, "-c", "raise SystemExit('no GPU here')"]
    monkeypatch.setattr(scaling.subprocess, "Popen", lambda _, **how: popen(command, **how))
    with pytest.raises(RuntimeError, match="no GPU here"), scaling.serving(tiny_task(tmp_path), 1, 1, []):
        pass


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_the_bench_of_the_sandbox_finds_nothing_left() -> None:
    for name, runs in (
        ("reads and prints", 18),
        ("sleeps for ever, ended after 1 s", 3),
    ):  # and a group that is not whole
        found = sandbox.measure(name, runs)
        assert found["runs"] == runs
        assert {key: found["left"][key] for key in ("processes", "descriptors", "mounts")} == dict.fromkeys(
            ("processes", "descriptors", "mounts"), 0
        )
        assert dict(zip(sandbox.COLUMNS, sandbox.row(found), strict=True))["runs"] == str(runs)


def test_the_bench_of_the_judge_counts_calls_against_the_ideal() -> None:
    found = judge.measure(1, 256, True, 64, 2)
    assert len(found["seconds"]) == 2 and all(seconds > 0.1 for seconds in found["seconds"])
    shown = dict(zip(judge.COLUMNS, judge.row(found | {"ideal": 0.5, "seconds": [1.0, 2.0, 1.5]}), strict=True))
    assert found["processor_seconds_a_call"] > 0 and shown["asked by"] == "1 process, with a cache"
    assert (shown["calls"], shown["at once"], shown["seconds"], shown["times the ideal"]) == (
        "64",
        "256",
        "1.50",
        "3.00",
    )


def test_the_bench_of_large_reports_makes_a_page_and_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_report, "PROMPTS", 2)
    with large_report.browsing() as browser:
        found = large_report.measure(3, browser)
    shown = dict(zip(large_report.COLUMNS, large_report.row(found), strict=True))
    assert shown["completions"] == "48" and float(shown["its memory, MB"]) > 1 and float(shown["page, MB"]) > 0
    assert (browser is None) == (shown["a word in all of them, s"] == "")


@pytest.mark.parametrize("file", sorted(BENCH.glob("study_*.yaml")), ids=lambda file: file.stem)
def test_every_cell_of_a_grid_is_a_run_that_can_be_composed(file: Path) -> None:
    cells = {cell.loss: cell for cell in study.plan(yaml.safe_load(file.read_text(encoding="utf-8")))}
    for cell in cells.values():
        code, out, err = sapo_train(*cell.overrides, "--cfg", "job")
        assert code == 0, err
        composed = yaml.safe_load(out)
        assert composed["seed"] == cell.seed
        assert composed["trainer"]["updates_per_rollout"] == cell.axes["trainer.updates_per_rollout"]


@pytest.mark.parametrize("kind", gate_width.KINDS)
def test_losses_of_a_width_have_half_of_their_gradient_there(kind: str) -> None:
    loss = build_loss(**gate_width.settings(kind, 0.2)).policy
    log_ratios = torch.tensor([1.0, 1.199, 1.2, 1.201], dtype=torch.float64).log()
    weights = loss.token_losses(log_ratios, log_ratios, torch.ones_like(log_ratios)).gradient_weight
    assert weights[0] == 1
    assert weights[1] > 0.5 > weights[3]
    assert (weights[1], weights[3]) == (1, 0) if kind.startswith("clip") else weights[2] == pytest.approx(0.5)


def test_the_task_of_the_widths_is_learnt_and_the_best_rate_counts() -> None:
    cell = gate_width.Cell("clip", 0.1, 4, 1e-2, 0)
    found = gate_width.learn(cell, steps=30)
    assert found == gate_width.learn(cell, steps=30)
    assert found > 3 / gate_width.TOKENS
    slow = [cell._replace(rate=1e-3, seed=seed) for seed in (0, 1)]
    fast = [cell._replace(seed=seed) for seed in (0, 1)]
    (row,) = gate_width.summary(dict(zip([*slow, *fast], [0.1, 0.2, 0.3, 0.5], strict=True)))
    assert (row["rate"], row["mean"], row["error"]) == (1e-2, pytest.approx(0.4), pytest.approx(0.1))
