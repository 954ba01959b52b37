"""Runs as one HTML file: it opens from the disk, asks no network, and runs no script but its own."""

from __future__ import annotations

import base64
import datetime
import gzip
import hashlib
import html
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from sapo_rl import __version__
from sapo_rl.errors import UserError
from sapo_rl.telemetry.progress import Progress
from sapo_rl.telemetry.report.curves import about, curves
from sapo_rl.telemetry.report.packing import LEVEL, packed, plain
from sapo_rl.telemetry.report.samples import Index, files_of, read, read_tokens, thinned

WEB = Path(__file__).parent / "web"
SCRIPTS = ("base.js", "plots.js", "curves.js", "time.js", "chat.js", "tokens.js", "samples.js", "heldout.js", "main.js")
"""The page's own, in the order in which they are read."""
MEGABYTES = 100.0
"""Of compressed completions in a page; of a run that has more, steps are left out."""
EXPANSION = 1.3
"""The size of completions in a page over that of their Parquet files."""


def write(runs: Sequence[Progress], out: Path, megabytes: float = MEGABYTES, live: float | None = None) -> None:
    """Write the page, so that whoever opens it sees the former one or the whole new one.

    Args:
        runs: as `runs.load` returns them.
        out: the file.
        megabytes: as many of completions are in it at most, about; beyond that steps are left out, evenly.
        live: seconds after which the page loads itself again.

    Raises:
        UserError: a run cannot be read, or the page cannot be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.writelines(_pieces(runs, megabytes, live))
        part.replace(out)
    except OSError as error:
        raise UserError(f"--out: '{out}' cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def unused(path: Path, runs: Sequence[Progress]) -> Path:
    """Return `path`, or the first of `name-2`, `name-3`... that holds nothing but a page of the same runs."""
    candidate, number = path, 2
    while candidate.exists() and not _is_of(candidate, runs):
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def _is_of(path: Path, runs: Sequence[Progress]) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return _mark(runs).encode() in file.read(2000)
    return False


def _mark(runs: Sequence[Progress]) -> str:
    """What a page says in its beginning of the runs that it shows."""
    folders = "\n".join(sorted(str(run.folder.resolve()) for run in runs))
    return f'<meta name="sapo-report" content="{hashlib.sha256(folders.encode()).hexdigest()[:16]}">'


def _pieces(runs: Sequence[Progress], megabytes: float, live: float | None) -> Iterator[str]:
    """The text of the page, piece by piece: it may be large."""
    head = about(runs) | {
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": __version__,
        "live": live,
    }
    names = [run["name"] for run in head["runs"]]
    script = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    library, library_hash = _library()
    template = (WEB / "page.html").read_text(encoding="utf-8")
    before, after = template.split("<!-- data -->")
    yield _filled(
        before,
        policy=f"'{_hash(script)}' '{library_hash}'",
        mark=_mark(runs),
        title=html.escape(", ".join(names) if len(names) < 4 else f"{len(names)} runs"),
        style=(WEB / "style.css").read_text(encoding="utf-8"),
    )
    yield f'<script id="head" type="application/json">{plain(head)}</script>\n'
    yield _chunk("library", library)
    for place, run in enumerate(runs):
        yield _chunk(f"{place}/curves", packed(curves(run.folder)))
        yield from _completions(f"{place}", run, megabytes / len(runs))
    yield _filled(after, script=script)


def _completions(name: str, run: Progress, megabytes: float) -> Iterator[str]:
    by_kind = {kind: [file for file in files_of(run) if file.kind == kind] for kind in ("step", "eval", "tokens")}
    tokens, budget = by_kind.pop("tokens"), megabytes * 2**20 / EXPANSION
    shown: set[int] = set()
    sizes = {kind: sum(file.size for file in own) for kind, own in by_kind.items()}
    for kind, own in by_kind.items():
        index = Index()
        for file in thinned(own, budget * sizes[kind] / (sum(sizes.values()) or 1)):
            words = read(file)
            shown |= {file.step} if kind == "step" else set()
            index.add(file.step, words)
            yield _chunk(f"{name}/{kind}/{file.step}", words.chunk)
        if own:
            yield _chunk(f"{name}/{kind}", packed(index.told() | {"files": len(own)}))
    tokens = [file for file in tokens if file.step in shown]
    for file in thinned(tokens, max(0.0, budget - sum(sizes.values()))):  # what the words leave
        yield _chunk(f"{name}/tokens/{file.step}", read_tokens(file))


def _chunk(name: str, text: str) -> str:
    return f'<script id="{name}" type="text/plain">{text}</script>\n'


def _filled(template: str, **parts: str) -> str:
    for name, text in parts.items():
        template = template.replace(f"{{{{{name}}}}}", text)
    return template


def _hash(script: str) -> str:
    """What names a script in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _library() -> tuple[str, str]:
    """The charting library, packed, and its hash. Found without importing its package, which takes a second."""
    spec = importlib.util.find_spec("plotly")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    path = folder / "package_data" / "plotly.min.js"
    if not path.is_file():
        raise UserError(
            "the page needs the package plotly: pip install plotly; or draw a picture, with --out report.png"
        )
    text = path.read_text(encoding="utf-8")
    return base64.b64encode(gzip.compress(text.encode(), LEVEL, mtime=0)).decode(), _hash(text)
