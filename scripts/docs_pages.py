"""What mkdocs needs beside the pages in docs/: those that are made out of the code, and links that lead out of docs/.

A hook of mkdocs, named in .mkdocs.yml.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from sapo_rl.losses import explain as gate
from sapo_rl.run import cli, eval, export, keys, other_names, serve
from sapo_rl.telemetry.report import cli as report

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^):#\s]+)[^)]*\)")
"""A link with its text and, without a fragment, its target."""
ELSEWHERE = ("../", "bench/", "runs/")
"""Beginnings, seen from docs/, of what is in the repository alone: code, and what was measured."""
PYTHON = """\
# Python

What a script or a notebook calls; how, is told [here](../python.md).

::: sapo_rl.run.api
    options: {members: [train, Run, Callback]}

## What passes from stage to stage

::: sapo_rl.types

## Losses

::: sapo_rl.losses
    options: {members: [PolicyLossFn, TokenLosses, bounded_ratio]}

## Engines

::: sapo_rl.engines.base
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    pages = {
        "reference/keys.md": keys_page(),
        "reference/recipes.md": recipes_page(),
        "reference/command_line.md": command_line_page(),
        "reference/python.md": PYTHON,
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave the text of links that lead out of the site, and put the tables of other trainers' names in their place."""
    tables = {"trl": other_names.TRL, "verl": other_names.VERL, "openrlhf": other_names.OPENRLHF}
    for program, names in tables.items():
        if (marker := f"<!-- names: {program} -->") in markdown:
            markdown = markdown.replace(marker, names_table(names))
    folder = posixpath.dirname(page.file.src_uri)

    def within(link: re.Match[str]) -> str:
        return link[1] if posixpath.normpath(posixpath.join(folder, link[2])).startswith(ELSEWHERE) else link[0]

    return LINK.sub(within, markdown)


def command_line_page() -> str:
    """Return the page with the usage of every command."""
    usages = {
        "sapo-train": cli.usage(),
        "sapo-eval": eval.usage(),
        "sapo-serve": serve.parser().format_help(),
        "sapo-export": export.parser().format_help(),
        "sapo-report": report.parser().format_help(),
        "sapo-explain": gate.USAGE,
    }
    parts = [f"\n## {name}\n\n```text\n{usage.strip()}\n```\n" for name, usage in usages.items()]
    return "# Command line\n" + "".join(parts)


def keys_page() -> str:
    """Return the page with every key of the config, a table for each section."""
    parts = ["# Config keys\n", "`sapo-train keys [PART]` prints the same. `NAME` stands for a name of your own.\n"]
    for section, found in groupby(keys.every_key(), key=lambda one: one.name.partition(".")[0]):
        rows = [f"| `{one.name}` | {_cell(_kind(one))} | {_cell(one.meaning)} |" for one in found]
        parts += [f"\n## {section}\n", "| key | type and default | meaning |", "|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _kind(key: keys.Key) -> str:
    default = f"default `{key.default}`" if key.default else "must be given"
    return "; ".join(filter(None, (key.type, key.valid, default)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def recipes_page() -> str:
    """Return the page with every recipe, as it stands in the repository."""
    parts = ["# Recipes\n", "`sapo-train config=NAME` runs one; all keys can be set behind it.\n"]
    for path in sorted((ROOT / "configs/config").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        about = (yaml.safe_load(text) or {}).get("description", "")
        parts += [f"\n## {path.stem}\n", f"{about}\n" if about else "", f"```yaml\n{text.strip()}\n```\n"]
    return "\n".join(parts)


def names_table(names: Mapping[str, tuple[str, str]]) -> str:
    """Return a table of another trainer's names."""
    return "\n".join(["| there | here | |", "|---|---|---|", *_name_rows(names)])


def _name_rows(names: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """Names of one answer share a row; those that have no key here come last."""
    rows = defaultdict[tuple[str, str], list[str]](list)
    for name, answer in sorted(names.items()):
        rows[answer].append(f"`{name}`")
    for (ours, note), there in sorted(rows.items(), key=lambda row: not row[0][0]):
        yield f"| {', '.join(there)} | {f'`{ours}`' if ours else 'none'} | {_cell(note)} |"
