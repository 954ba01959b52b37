"""The page of `sapo-report` in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from optional import CHROMIUM
from report_made import EVIL, HALF, STEPS, write_some_tokens, write_whole_run

from sapo_rl.telemetry.report import page
from sapo_rl.telemetry.report.cli import main
from sapo_rl.telemetry.report.runs import load, load_all

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
expect = playwright.expect
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two settings, one of them with two seeds, and the pages of all and of the first."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, tau in (("a0", 0, 1.05), ("a1", 1, 1.05), ("b0", 0, 2.0)):
        write_whole_run(folder / name, seed, tau)
    page.write([load(folder / name) for name in ("a0", "a1", "b0")], folder / "all.html")
    page.write([load(folder / "a0")], folder / "one.html")
    write_some_tokens(write_whole_run(folder / "t0", 0, 1.0), 3)
    page.write([load(folder / "t0")], folder / "tokens.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: playwright.Browser, folder: Path) -> Iterator[playwright.Page]:
    """`open_page(name, hash, **options)`: a page that may write no error, ask no network and run nobody's script."""
    contexts, problems = [], []

    def opened(name: str, hash: str = "", **options: object) -> playwright.Page:
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:", "blob:")) or problems.append(request.url),
        )
        tab.goto(f"{(folder / name).as_uri()}#{hash}")
        expect(tab.locator("main[data-ready]")).to_be_attached()
        return tab

    yield opened
    for context in contexts:
        for tab in context.pages:
            assert tab.evaluate("window.pwned") is None
        context.close()
    assert problems == []


def drawn(tab: playwright.Page, metric: str) -> dict:
    """The traces and the layout of a metric's plot."""
    expect(tab.locator(f"[data-metric='{metric}'] .main-svg").first).to_be_attached()
    return tab.evaluate(
        "m => { const p = document.querySelector(`[data-metric='${m}'] .plot`); return {"
        "traces: p.data.map(({x, y, name, fill}) => ({x, y, name, fill})), log: p.layout.yaxis.type === 'log',"
        "marks: p.layout.shapes.map((one) => one.x0)}; }",
        metric,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1440])
def test_every_view_opens_at_any_width(open_page, width: int, scheme: str, tmp_path: Path) -> None:
    tab = open_page("all.html", viewport={"width": width, "height": 900}, color_scheme=scheme)
    for name in ("curves", "time", "completions", "heldout", "settings"):
        tab.click(f"#tab-{name}")
        expect(tab.locator(f"main[data-ready={name}]")).to_be_visible()
        if name in ("curves", "time"):
            expect(tab.locator(".plot .main-svg").first).to_be_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        assert len(tab.screenshot(path=tmp_path / f"{name}.png")) > 10_000
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", light)[0]) > 128) == (scheme == "light")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"


def test_runs_that_differ_in_their_seed_alone_are_a_mean_with_a_band(open_page) -> None:
    tab = open_page("all.html")
    found = drawn(tab, "reward/mean")
    steps = list(range(1, STEPS + 1))
    low, high, mean, other = found["traces"]
    assert [one["x"] for one in found["traces"]] == [steps] * 4
    assert low["y"] == pytest.approx([step / 100 for step in steps]) == other["y"]
    assert high["y"] == pytest.approx([step / 100 + 1 for step in steps]) and high["fill"] == "tonexty"
    assert mean["y"] == pytest.approx([step / 100 + 0.5 for step in steps])
    assert mean["name"] == "tau_neg=1.05, 2 seeds" and other["name"] == "b0"
    assert set(found["marks"]) == {5, 11, 15}  # a warning, a resume and a restart
    tab.get_by_label("mean and band over seeds").uncheck()
    assert [one["name"] for one in drawn(tab, "reward/mean")["traces"]] == ["a0", "a1", "b0"]
    tab.get_by_role("button", name="a1").click()
    assert [one["name"] for one in drawn(tab, "reward/mean")["traces"]] == ["a0", "b0"]


def test_curves_are_smoothed_and_have_logarithmic_axes(open_page) -> None:
    tab = open_page("one.html", "smooth=0.5&x=time")
    raw, smooth = drawn(tab, "reward/mean")["traces"]
    assert raw["y"] == pytest.approx([step / 100 for step in range(1, STEPS + 1)])
    assert smooth["y"][:2] == pytest.approx([0.01, (0.25 * 0.01 + 0.5 * 0.02) / 0.75])
    assert smooth["x"][:2] == pytest.approx([2 / 60, 4 / 60])  # minutes
    card = tab.locator("[data-metric='reward/mean']")
    card.get_by_role("button", name="log").click()
    expect(card.get_by_role("button", name="log")).to_have_attribute("aria-pressed", "true")
    tab.wait_for_timeout(200)
    assert drawn(tab, "reward/mean")["log"] and not drawn(tab, "eval/reward")["log"]
    tab.get_by_placeholder("find a metric").fill("restarts")
    expect(tab.locator("figure[data-metric]")).to_have_count(1)
    assert drawn(tab, "rollout/engine_restarts")["traces"][0]["y"] == [0] * 14 + [1] * 6


def test_what_happened_and_what_differs_are_told(open_page) -> None:
    tab = open_page("all.html", "tab=time")
    rows = tab.locator("main table tbody tr")
    expect(rows).to_have_count(9)
    assert rows.nth(0).locator("td").all_inner_texts() == ["a0", "5", "11.0s", "warning", f"hot {EVIL}{HALF}"]
    assert rows.nth(8).locator("td").all_inner_texts() == ["b0", "15", "30.0s", "restart", "restart of an engine"]
    expect(tab.locator(".plot .main-svg").first).to_be_visible()
    assert tab.evaluate("document.querySelector('.plot').data.map(({name, x}) => [name, x])") == [
        ["rollout", [1.5] * 3],
        ["update", [0.5] * 3],
    ]
    tab.click("#tab-settings")
    told = [row.split("\t") for row in tab.locator("#differ table").inner_text().splitlines()]
    assert told == [["", "a0", "a1", "b0"], ["loss.tau_neg", "1.05", "1.05", "2.0"], ["seed", "0", "1", "0"]]
    assert ["eval reward, last", "0.500", "0.500", "0.500"] in [
        row.split("\t") for row in tab.locator("#results table").inner_text().splitlines()
    ]


def test_the_runs_of_a_sweep_have_its_name_above_them(open_page, folder: Path) -> None:
    for name in ("s0", "s1", "u0"):
        write_whole_run(folder / name, 0, float(name[1]) + 1)
        if name[0] == "s":
            (folder / name / "environment.json").write_text('{"sweep": "sweep 2026-01-02"}')
    page.write(load_all([folder / "s0", folder / "u0", folder / "s1"], print), folder / "sweep.html")
    tab = open_page("sweep.html", "tab=settings")
    above = tab.locator("#results .sweeps th")
    assert above.evaluate_all("all => all.map((one) => [one.textContent, one.colSpan])") == [
        ["", 1],
        ["sweep 2026-01-02", 2],
        ["", 1],
    ]
    assert tab.locator("#results thead tr").last.inner_text().split() == ["s0", "s1", "u0"]
    expect(tab.locator("#runs > small")).to_have_text(["sweep 2026-01-02"])


def test_completions_are_filtered_and_searched(open_page) -> None:
    tab = open_page("one.html", "tab=completions")
    count, rows = tab.locator("#count"), tab.locator(".list .row")
    expect(count).to_have_text(f"{6 * STEPS} of {6 * STEPS} completions")
    for field, value, left in (
        ("step from", "11", 60),
        ("reward from", "0.5", 40),
        ("tokens to", "8", 20),
    ):
        tab.get_by_label(field).fill(value)
        expect(count).to_have_text(f"{left} of 120 completions")
    tab.get_by_placeholder("prompt, or #number").fill("is 13 +")
    expect(count).to_have_text("1 of 120 completions")
    expect(rows.locator(".said").last).to_have_text("half of step 13")
    expect(tab.locator("h2")).to_have_text("step 13, prompt #26")
    tab.get_by_role("button", name="clear").click()
    tab.get_by_label("stop").select_option("length")
    expect(count).to_have_text("20 of 120 completions")
    tab.get_by_label("stop").select_option("")
    tab.get_by_placeholder("words of the completion").fill("HALF of step 7")
    expect(count).to_have_text("2 of 120 completions")
    tab.get_by_role("button", name="clear").click()
    tab.get_by_title("sort by length").click()
    tab.get_by_title("sort by length").click()
    expect(rows.first).to_contain_text("20")
    assert rows.first.locator(".number").all_inner_texts() == ["20", "0", "-1.25", "20"]


def test_a_group_is_side_by_side_with_its_answer(open_page) -> None:
    tab = open_page("one.html", "tab=completions")
    tab.get_by_label("step from").fill("3")
    tab.get_by_text("half of step 3").first.click()
    expect(tab.locator("h2")).to_have_text("step 3, prompt #6")
    cards = tab.locator(".completion")
    assert cards.locator("header").all_inner_texts() == [
        text.replace(" | ", "\n")
        for text in (
            "2 | reward 0.5 | advantage 0 | 5 tokens | stop",  # the one that was chosen
            "1 | reward 0 | advantage -1.25 | 3 tokens | length",
            "3 | reward 1 | advantage +1.25 | 9 tokens | stop",
        )
    ]
    expect(cards.nth(0)).to_have_class(re.compile("chosen"))
    assert cards.nth(1).locator("pre").inner_text() == f"wrong {EVIL}"
    assert tab.locator(".prompt pre").inner_text() == f"What is 3 + 1? {EVIL}"
    assert tab.locator(".columns").inner_text().split() == ["answer", "4", "level", "hard"]
    tab.keyboard.press("ArrowDown")
    expect(cards.nth(0).locator("b").first).to_have_text("3")


def test_all_conversations_of_an_agent_are_shown_and_searched(open_page) -> None:
    tab = open_page("one.html", "tab=completions&prompt=%237")
    expect(tab.locator("h2")).to_have_text("step 3, prompt #7")
    card = tab.locator(".completion").nth(2)
    assert card.locator(".conversation > .role").all_inner_texts() == ["conversation 1", "conversation 2"]
    first, second = (card.locator(".conversation").nth(number).locator(".message pre") for number in (0, 1))
    assert first.all_inner_texts() == [f"Anybody? {EVIL}", "Nobody in 3."]
    assert second.all_inner_texts()[:2] == ["You have eyes.", "Play."] and second.last.inner_text() == "right"
    expect(tab.locator(".completion").first.locator(".conversation")).to_have_count(0)
    tab.get_by_role("button", name="clear").click()
    tab.get_by_placeholder("words of the completion").fill("nobody in 7")
    expect(tab.locator("#count")).to_have_text("1 of 120 completions")


def test_an_episode_is_a_chat_in_which_what_is_not_trained_on_is_grey(open_page) -> None:
    tab = open_page("one.html", "tab=completions&prompt=%237")
    expect(tab.locator("h2")).to_have_text("step 3, prompt #7")
    assert tab.locator(".prompt .role").all_inner_texts() == ["system", "user"]
    card = tab.locator(".completion").first
    assert card.locator(".message").evaluate_all("all => all.map((one) => one.className)") == [
        "message own",
        "message masked",
        "message own",
    ]
    grey, own = (card.locator(f".message.{kind} pre").last for kind in ("masked", "own"))
    colours = [one.evaluate("node => getComputedStyle(node).color") for one in (grey, own)]
    assert colours[0] != colours[1]
    assert card.locator(".call").inner_text() == 'look{ "at": 3 }'
    assert card.locator(".role").all_inner_texts() == ["assistant", "tool · look", "assistant"]
    assert f"Looking. {EVIL}{HALF}" in card.locator("pre").all_inner_texts()
    expect(card.get_by_text("where?")).to_be_hidden()
    card.get_by_text("thinking").click()
    expect(card.get_by_text("where?")).to_be_visible()
    assert "moves" in (card.locator("details").last.text_content() or "")


def shades(tab: playwright.Page, card: int) -> list[list[str]]:
    """What each token of a card says, on which side of the colours it is, and how strong."""
    found = tab.locator(".completion").nth(card).locator(".token")
    return found.evaluate_all(
        "all => all.map((one) => [one.textContent, one.classList[1], one.style.getPropertyValue('--at')])"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_completion_is_coloured_by_what_the_update_made_of_its_tokens(open_page, scheme: str) -> None:
    tab = open_page("tokens.html", "tab=completions&from=3&to=3", color_scheme=scheme)
    expect(tab.locator(".completion pre.own").first).to_have_text(f"wrong {EVIL}")
    words, full = ["wrong ", EVIL, "\n"], "60.0%"
    tab.get_by_role("button", name="ratio").click()
    expect(tab.locator(".legend")).to_contain_text("≤ 0.51≥ 2not trained on")
    assert shades(tab, 0) == [[words[0], "low", full], [words[1], "high", "0.0%"], [words[2], "high", full]]
    first = tab.locator(".completion").first.locator(".token")
    drawn = first.evaluate_all("all => all.map((one) => getComputedStyle(one).backgroundColor)")
    assert len(set(drawn)) == 3
    assert (first.nth(0).get_attribute("title") or "").splitlines() == [
        'token 1: "wrong "',
        *("log-prob -0.1", "ratio 0.5", "gate weight 0.25"),
    ]
    expect(tab.locator(".completion").nth(1)).to_contain_text("not trained on in this step")
    expect(tab.locator(".completion").nth(1).locator("pre.own")).to_have_text("half of step 3")
    assert shades(tab, 2) == [["", "high", "0.0%"], ["é", "high", "0.0%"]]
    tab.get_by_role("button", name="gate weight").click()
    expect(tab.locator(".legend")).to_contain_text("≤ 0.251not trained on")
    assert [one[1:] for one in shades(tab, 0)] == [["low", full], ["high", "0.0%"], ["high", "0.0%"]]
    tab.get_by_role("button", name="log-prob").click()
    expect(tab.locator(".legend")).to_contain_text("≤ -80not trained on")
    assert [one[1:] for one in shades(tab, 0)] == [["low", "0.8%"], ["low", "15.0%"], ["low", full]]
    tab.get_by_role("button", name="text").click()
    expect(tab.locator(".token")).to_have_count(0)
    tab.goto(f"{tab.url.partition('#')[0]}#tab=completions&from=4&to=4&colour=ratio")
    tab.reload()
    expect(tab.locator(".completion").first).to_contain_text("the page holds no tokens of this step")


def test_what_an_environment_wrote_is_grey_among_the_tokens_of_an_episode_of_several_rows(open_page) -> None:
    tab = open_page("tokens.html", "tab=completions&prompt=%237&colour=ratio")
    expect(tab.locator("h2")).to_have_text("step 3, prompt #7")
    assert shades(tab, 0) == [
        *(["wrong ", "high", "0.0%"], ["sees", "masked", ""], ["wrong ", "masked", ""]),
        ["é", "high", "60.0%"],
    ]
    assert tab.locator(".completion").first.locator(".role").all_inner_texts() == ["row 1", "row 2"]
    tab = open_page("one.html", "tab=completions&colour=ratio")
    expect(tab.locator(".completion").first).to_be_visible()
    expect(tab.get_by_role("button", name="ratio")).to_have_count(0)


def test_the_same_held_out_prompt_is_shown_over_the_evaluations(open_page) -> None:
    tab = open_page("one.html", "tab=heldout")
    expect(tab.locator("#count")).to_have_text("2 of 2 prompts, 3 evaluations")
    cells = tab.locator(".list .row").first.locator(".cells i")
    assert cells.evaluate_all("all => all.map((one) => one.title)") == ["step 0: 0", "step 10: 1", "step 20: 1"]
    assert tab.locator(".completion header b").all_inner_texts() == [
        *("step 0", "step 10", "step 20"),
        *("step 20, sample 1", "step 20, sample 2"),
    ]
    assert tab.locator(".completion pre.own").all_inner_texts()[:3] == ["0 at 0", "0 at 10", "0 at 20"]
    tab.get_by_label("prompts").select_option("low")
    expect(tab.locator("h2")).to_have_text("held-out prompt #1")
    expect(tab.locator("#count")).to_have_text("1 of 2 prompts, 3 evaluations")


def test_another_set_of_held_out_prompts_is_chosen(open_page) -> None:
    tab = open_page("one.html", "tab=heldout")
    tab.get_by_label("set").select_option("hard")
    expect(tab.locator("#count")).to_have_text("1 of 1 prompts, 3 evaluations")
    cells = tab.locator(".list .row").first.locator(".cells i")
    titles = cells.evaluate_all("all => all.map((one) => one.title)")
    assert titles == ["step 0: \u2013", "step 10: 0.25", "step 20: 0.25"]
    expect(tab.locator(".prompt pre")).to_have_text("Harder")


def test_a_point_of_a_curve_leads_to_the_completions_of_its_step(open_page) -> None:
    tab = open_page("one.html", viewport={"width": 1200, "height": 900})
    drawn(tab, "reward/mean")
    box = tab.locator("[data-metric='reward/mean'] .nsewdrag").first.bounding_box()
    assert box
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(tab.locator("[data-metric='reward/mean'] .hoverlayer text").first).to_be_attached()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(tab.locator("#count")).to_have_text("6 of 120 completions")
    step = tab.get_by_label("step from").input_value()
    expect(tab.locator("h2")).to_have_text(f"step {step}, prompt #{2 * int(step)}")
    tab.go_back()
    expect(tab.locator("main[data-ready=curves]")).to_be_attached()


def test_a_page_of_a_run_that_goes_on_loads_itself_again_where_one_was(open_page, folder: Path) -> None:
    runs = load_all([folder / "b0"], print)
    page.write(runs, folder / "live.html", live=1.0)
    tab = open_page("live.html", "tab=completions&from=4")
    expect(tab.locator("#count")).to_have_text("102 of 120 completions")
    runs[0].steps.pop()  # as if the run were not so far
    page.write(runs, folder / "live.html", live=None)
    expect(tab.locator("#count")).to_have_text("96 of 114 completions")
    expect(tab.get_by_label("follow")).to_have_count(0)


def test_a_large_run_is_thinned_and_says_so(open_page, folder: Path) -> None:
    assert main([str(folder / "b0"), "--out", str(folder / "thin.html"), "--megabytes", "0.02"]) == 0
    tab = open_page("thin.html", "tab=completions")
    told = tab.locator("#count").inner_text()
    found = re.fullmatch(r"(\d+) of \1 completions \(of (\d+) of 20 steps: the page holds no more\)", told)
    assert found and int(found[1]) == 6 * int(found[2]) < 120
    steps = tab.locator(".list .row").evaluate_all("all => all.map((one) => one.firstChild.textContent)")
    assert steps[0] == "1"
