"""The code on the pages, run in a user's folder as docs/extending.md says, and the examples in docstrings."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import functools
import http.server
import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from inside import sapo_train
from optional import CHROMIUM
from tiny import engine_settings, logps_of

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of docs/extending.md, each under the name in its first line; the current one."""
    for language, text in blocks("docs/extending.md"):
        if language in ("python", "yaml"):
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the page's modules by name; it is forgotten afterwards."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_the_game_of_docs_environments_plays_and_passes_a_dry_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for language, text in blocks("docs/environments.md"):
        name = text.partition("\n")[0].removeprefix("# ")
        if language in ("python", "yaml") and name.endswith((".py", ".yaml")):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    game = importlib.import_module("my_game").Anagram(hints=1)
    assert sorted(game.reset("stone", seed=3).removeprefix(" The letters: ")) == sorted("stone")
    assert game.step("notes") == ("No. It begins with s", 0.0, False)
    assert game.step("onset") == ("No. It begins with st", 0.0, True)
    assert game.step(" Stone") == (None, 1.0, True)
    code, shown, told = sapo_train("config=game.yaml", f"model.path={tiny_model}", "dry_run=true")
    assert code == 0, told
    assert "longest sequence" in shown and "256 tokens" in shown
    code, _, told = sapo_train(
        "config=game.yaml", f"model.path={tiny_model}", "+environment.args.hint=3", "dry_run=true"
    )
    assert code == 2 and "environment.args.hint: unknown argument; did you mean 'hints'?" in told


@pytest.mark.parametrize(
    ("page", "recipe", "shown", "mistake", "told"),
    [
        (
            "own_reward",
            "short.yaml",
            ["held-out rows 0", "columns prompt, answer", "longest sequence 192 tokens"],
            "reward.functions.short.args.most=many",
            "sapo-train: reward.functions.short.args.most: 'many' is a str, must be int",
        ),
        (
            "tool_agent",
            "agent.yaml",
            ["held-out rows 16", "longest sequence 384 tokens"],
            "tools=[my_tools.multply]",
            "did you mean 'multiply'",
        ),
    ],
)
def test_the_recipes_of_the_tutorials_pass_a_dry_run(
    page: str,
    recipe: str,
    shown: list[str],
    mistake: str,
    told: str,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for language, text in blocks(f"docs/tutorials/{page}.md"):
        name = "questions.jsonl" if language == "json" else text.partition("\n")[0].removeprefix("# ")
        if language in ("python", "yaml", "json"):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    lengths = ("data.max_prompt_tokens=128", "environment.max_tokens=256")  # the tiny model reads no more
    call = (f"config={recipe}", f"model.path={tiny_model}", *lengths, "dry_run=true")
    code, out, err = sapo_train(*call)
    table = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    assert code == 0 and set(shown) <= set(table), out + err
    code, out, err = sapo_train(*call, mistake)
    assert code == 2 and told in err


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation's pages, built without a warning."""
    pytest.importorskip("material", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_is_built_without_a_broken_link(site: Path) -> None:
    keys = (site / "reference/keys/index.html").read_text(encoding="utf-8")
    assert "<code>loss.tau_pos</code>" in keys and "<code>rollout.refill.max_extra</code>" in keys
    tutorial = (site / "tutorials/tool_agent/index.html").read_text(encoding="utf-8")
    assert 'href="../../environments/#measured"' in tutorial
    example = (site / "examples/tool_agent/index.html").read_text(encoding="utf-8")
    assert 'href="my_tools.py"' in example and (site / "examples/tool_agent/my_tools.py").is_file()
    names = (site / "howto/from_verl/index.html").read_text(encoding="utf-8")
    assert "<code>train_batch_size</code>" in names and "names: verl" not in names
    names = (site / "howto/from_openrlhf/index.html").read_text(encoding="utf-8")
    assert "<code>rollout_batch_size</code>" in names and "names: openrlhf" not in names
    assert 'id="sapo_rl.run.api.train"' in (site / "reference/python/index.html").read_text(encoding="utf-8")
    commands = (site / "reference/command_line/index.html").read_text(encoding="utf-8")
    for command, part in (
        ("sapo-train", "check=machine"),
        ("sapo-eval", "aime2025"),
        ("sapo-serve", "--gpu-memory"),
        ("sapo-export", "--push"),
        ("sapo-report", "--watch"),
        ("sapo-explain", "[tau_neg=1.05]"),
    ):
        assert f'id="{command}"' in commands and part in commands
    outside = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://")
    assert not [page for page in site.rglob("*.html") if outside.search(page.read_text(encoding="utf-8"))]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_site_opens_in_a_browser_and_is_searched(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []
    with serving(site) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("console", lambda message: message.type == "error" and problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(address) or problems.append(request.url))
        for page, heading in (
            ("", "sapo-train"),
            ("study/", "When does SAPO win?"),
            ("reference/keys/", "Config keys"),
        ):
            tab.goto(address + page)
            playwright.expect(tab.get_by_role("heading", level=1)).to_contain_text(heading)
        ready = tab.locator(".md-search-result__meta")  # before that nothing listens to what is typed
        playwright.expect(ready).to_contain_text("Type to start searching", timeout=60_000)
        tab.get_by_label("Search", exact=True).first.press_sequentially("tau_pos")
        playwright.expect(tab.locator(".md-search-result__item").first).to_contain_text("tau_pos", timeout=60_000)
        browser.close()
    assert not problems


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_the_comparison_of_docs_rewards_ranks_the_replies_to_a_prompt() -> None:
    names: dict[str, Any] = {}
    for language, text in blocks("docs/rewards.md"):
        if language == "python":
            exec(compile(text, "docs/rewards.md", "exec"), names)
    assert names["rank"](completions=["a", "b", "c"], completion_ids=[[1, 2], [1], [1, 2, 3]]) == [0.5, 1.0, 0.0]
    assert names["rank"](completions=["a"], completion_ids=[[1, 2]]) == [1.0]


@pytest.mark.parametrize("page", ["README.md", "docs/sapo.md"])
def test_python_on_other_pages_runs(page: str) -> None:
    texts = [text for language, text in blocks(page) if language == "python"]
    assert texts
    names: dict[str, Any] = {"__name__": __name__}  # a block may go on where the one before it ended
    for text in texts:
        exec(compile(text, page, "exec"), names)


@pytest.mark.parametrize(
    "name",
    [
        *("sapo_rl.losses.base", "sapo_rl.losses.budget", "sapo_rl.losses.build", "sapo_rl.losses.sapo"),
        *(
            f"sapo_rl.losses.{name}"
            for name in ("cispo", "cppo", "dppo", "gmpo", "grpo", "gspo", "m2po", "reinforce", "vespo")
        ),
        *("sapo_rl.losses.correction", "sapo_rl.losses.divergence", "sapo_rl.losses.gates", "sapo_rl.types"),
        *(f"sapo_rl.config{name}" for name in ("", ".data", ".evaluation", ".logging", ".loss")),
        *("sapo_rl.engines.base", "sapo_rl.engines.build"),
        *("sapo_rl.environments.search", "sapo_rl.rewards.short_answers"),
        *(
            "sapo_rl.policy.packing",
            "sapo_rl.policy.temperatures",
            "sapo_rl.rollout.share",
            "sapo_rl.telemetry.progress",
        ),
        "sapo_rl.data.pass_rates",
    ],
)
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


def test_the_loss_has_the_gradient_that_it_names(module: Any) -> None:
    import torch

    from sapo_rl.losses import LossInputs, build_loss

    logps = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    inputs = LossInputs(
        logps=logps,
        old_logps=old,
        advantages=advantages,
        sequence_ids=torch.tensor([0, 0, 1]),
        num_sequences=2,
        token_weights=torch.full((3,), 0.5, dtype=torch.float64),
    )
    outputs = build_loss(module("my_losses").Truncated, clip_high=0.5)(inputs)
    outputs.loss.backward()
    weights = [1.0, 1.5, math.exp(-1.0)]  # the ratio of the second token is e, cut at 1.5
    expected = [-0.5 * weight * advantage for weight, advantage in zip(weights, advantages.tolist(), strict=True)]
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx(expected, rel=1e-12)
    ratio = (logps.detach() - old).exp()
    by_weight = -advantages * ratio * outputs.gradient_weight * 0.5
    assert by_weight.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_reward_functions_score_each_completion(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    arriving = asyncio.Barrier(2)

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.wait_for(arriving.wait(), 30)  # the second is asked before the first is answered
        asked = json.loads(request.content)
        assert request.headers["Authorization"] == "Bearer secret" and asked["prompt"] == "How?"
        return httpx.Response(200, json={"score": len(asked["completion"]) / 10})

    client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "AsyncClient", client)
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    given: dict[str, Any] = {"prompts": ["How?"] * 2, "completions": ["so", "thus"], "answer": [1, 1]}
    rewards = module("my_rewards")
    assert rewards.brief(**given, most=3) == [1.0, 0.0]
    assert asyncio.run(rewards.judge(**given, url="http://judge/")) == [0.2, 0.4]


def test_the_data_source_returns_rows_with_their_answer(module: Any) -> None:
    rows = list(module("my_data").letters(count=50))
    assert len(rows) == 50 and rows == list(module("my_data").letters(count=50))
    assert all(row["word"].count(row["letter"]) == row["count"] for row in rows)


@pytest.mark.usefixtures("folder")
def test_the_recipe_with_all_of_them_passes_a_dry_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    code, shown, told = sapo_train("config=mine.yaml", f"model.path={tiny_model}", "dry_run=true")
    assert code == 0, told
    table = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert "held-out rows 16" in table and "columns word, letter, count" in table, shown


def test_the_engine_writes_scores_and_takes_weights(module: Any, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from tiny import make_tiny_model, make_tokenizer
    from transformers import AutoModelForCausalLM

    from sapo_rl.config import RolloutConfig
    from sapo_rl.engines.parity import verify
    from sapo_rl.rollout.collector import Rollouts
    from sapo_rl.types import Prompt

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    engine = module("my_engine").PlainEngine(engine_settings(tiny_model, tmp_path / "log"))
    engine.start()
    engine.wait_ready()
    config = RolloutConfig(group_size=2, max_completion_tokens=4, logprobs=True)
    rollouts = Rollouts([engine], config, tokenizer, seed=0, reproducible=True)
    prompts = [Prompt(index, tokenizer(text)["input_ids"], text, {}) for index, text in enumerate(("1 + 1", "2 + 5"))]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    groups = rollouts.write(prompts, step=1).groups
    assert groups == rollouts.write(prompts, step=1).groups != rollouts.write(prompts, step=2).groups
    for group in groups:
        for sample in group.samples:
            expected = logps_of(model, [*group.prompt.token_ids, *sample.token_ids])[len(group.prompt.token_ids) - 1 :]
            assert sample.rows[0].rollout_logps == pytest.approx(expected, abs=1e-5)
            assert 1 <= len(sample.token_ids) <= 4 and sample.versions == (0, 0)
    likeliest = model(torch.tensor([prompts[0].token_ids])).logits[0, -1].argmax()
    assert rollouts.greedy(prompts, 1)[0].samples[0].token_ids == [likeliest]

    other = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "other", seed=1))
    module("my_engine").CopyTransport().push(other.named_parameters(), [engine], version=3)
    token_ids = [*prompts[0].token_ids, *groups[0].samples[0].token_ids]
    assert verify(engine, token_ids, logps_of(other, token_ids), "float32") < 1e-5
    assert rollouts.write(prompts, step=1).groups[0].samples[0].versions == (3, 3)
    engine.close()
