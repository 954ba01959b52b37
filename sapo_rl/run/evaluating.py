"""One rank of `sapo-eval`: it has each model answer the sets, as many as are alike in one start of vLLM."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from rich.console import Console
from transformers import AutoConfig, PreTrainedTokenizerBase

from sapo_rl import run_folder
from sapo_rl.config import ModelConfig
from sapo_rl.data import build_prompts, load_rows
from sapo_rl.engines.build import build_transport, model_facts
from sapo_rl.errors import SharedError
from sapo_rl.evaluation.measure import Answers, answers, check_judge
from sapo_rl.evaluation.sets import EvalSet, check_set, comparison_warnings, default_set, named_sets, set_warnings
from sapo_rl.policy import checkpoint
from sapo_rl.policy.model import check_shapes, load_tokenizer, stop_tokens
from sapo_rl.policy.saved import saved_weights, trainable_shapes
from sapo_rl.run import subjects
from sapo_rl.run.eval_results import Result, save, tables
from sapo_rl.run.subjects import Subject, model_of
from sapo_rl.run.writing import Rank, Writing, start_writing, wait_for
from sapo_rl.telemetry.report.table import show
from sapo_rl.weights.base import WeightTransport

PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a model's Hugging Face config in which models that one engine can serve may differ."""


class Candidate(NamedTuple):
    """A model to measure."""

    number: int
    """Its place in what was asked for."""
    label: str
    subject: Subject
    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def kind(self) -> str:
        """What an engine and prompts depend on; of models with the same one after the other can be loaded."""
        shape = AutoConfig.from_pretrained(
            self.model.path,
            revision=self.model.revision or "main",
            trust_remote_code=self.model.trust_remote_code,
        ).to_dict()
        known = {key: value for key, value in shape.items() if key not in PASSING}
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else sorted(self.tokenizer.get_vocab())
        stops = stop_tokens(self.model, self.tokenizer)
        return json.dumps(
            [known, words, self.tokenizer.chat_template, stops, self.model.dtype], sort_keys=True, default=str
        )


def evaluate(rank: Rank) -> None:
    """Measure the models that the folder names, print the numbers, and leave them in the folder.

    Raises:
        UserError: a model or a set that cannot be read, or columns that a reward function lacks.
    """
    console = Console(quiet=not rank.accelerator.is_main_process, highlight=False)
    found = subjects.loads((rank.folder / run_folder.MODELS).read_text(encoding="utf-8"))
    candidates = [
        Candidate(number, label, one, model_of(one), load_tokenizer(model_of(one)))
        for number, (label, one) in enumerate(zip(subjects.labels(found), found, strict=True))
    ]
    for one in candidates:
        _check(one, rank)
    alike: dict[str, list[Candidate]] = {}
    for one in candidates:
        alike.setdefault(one.kind, []).append(one)
    for text in comparison_warnings(rank.config):
        console.print(f"warning: {text}", style="yellow")
    results = {one.number: result for group in alike.values() for one, result in _measured(rank, group, console)}
    if rank.accelerator.is_main_process:
        ordered = [results[number] for number in sorted(results)]
        save(rank.folder, ordered)
        for table in tables(ordered):
            show(table)
        console.print(f"results  {rank.folder}", markup=False)


def _check(one: Candidate, rank: Rank) -> None:
    """Refuse a damaged checkpoint or model before any engine starts."""
    check_shapes(one.model)
    if one.subject.checkpoint is not None:
        shapes = trainable_shapes(one.model)
        try:
            checkpoint.check(Path(one.subject.checkpoint), shapes, rank.accelerator)
        except SharedError as error:
            raise SharedError(str(subjects.damaged(error))) from error


def _measured(rank: Rank, alike: Sequence[Candidate], console: Console) -> Iterator[tuple[Candidate, Result]]:
    """Yield the models, all of one kind, with what they came to."""
    first = alike[0]
    whole = replace(first.model, lora=replace(first.model.lora, sync="merged"))  # the others may have no adapters
    config = replace(rank.config, model=whole)
    own = replace(rank, config=config, tokenizer=first.tokenizer, facts=model_facts(first.model))
    with contextlib.ExitStack() as stack:
        transport = build_transport(config, own.facts, own.device, rank.token, rank.accelerator.is_main_process)
        stack.callback(transport.close)
        writing = start_writing(own, stack, first.label)
        sets = _sets(own, writing, console)
        wait_for(writing.engines, own, lambda text: console.print(text, style="dim"))
        loaded = None if first.subject.checkpoint else first.model.path  # what the engines have by themselves
        for one in alike:
            if one.subject.checkpoint or one.model.path != loaded:
                _publish(one, transport, writing)
                loaded = None
            yield one, _measure(one, sets, own, writing, console)


def _publish(one: Candidate, transport: WeightTransport[Any], writing: Writing) -> None:
    folder = one.subject.checkpoint
    weights = saved_weights(one.model, Path(folder) if folder else None)
    transport.push(weights, writing.engines, one.number + 1)


def _sets(rank: Rank, writing: Writing, console: Console) -> list[EvalSet]:
    """Read the sets, those that are held out of the config's own data first."""
    config, sets, dropped = rank.config, list[EvalSet](), 0
    if config.eval.prompts:
        _, rows = load_rows(config.data, config.eval.prompts)
        prompts, dropped = build_prompts(rows, config.data, rank.tokenizer)
        sets.append(replace(default_set(config, prompts), left_out=dropped))
    sets += named_sets(config, rank.tokenizer)
    for one in sets:
        check_set(config, one, rank.rewards, [*writing.pools.values()])
    for text in set_warnings(sets, []):
        console.print(f"warning: {text}", style="yellow")
    return sets


def _measure(one: Candidate, sets: Sequence[EvalSet], rank: Rank, writing: Writing, console: Console) -> Result:
    found: list[tuple[EvalSet, Answers]] = []
    for each in sets:
        console.print(f"{one.label}: {each.name}, {len(each.prompts):,} prompts", style="dim", markup=False)
        share = rank.share.of(each.prompts)
        told = answers(each, share, one.subject.step, writing.writer, rank.rewards).gathered(gather_object)
        check_judge(each, told)
        found.append((each, told))
    return Result(one.label, one.subject, found, rank.config)
