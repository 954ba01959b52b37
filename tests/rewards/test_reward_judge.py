"""A model that judges: what it is asked, how its answers are read, and servers that are slow, busy, wrong or gone."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rewards.groups import group, rewards

from sapo_rl.config import RewardConfig, RewardFunctionConfig
from sapo_rl.errors import UserError
from sapo_rl.processes.posting import ServerError
from sapo_rl.rewards import RewardPool, check_function, judge
from sapo_rl.rewards.tournament import games

Answer = Callable[[dict[str, Any], int], "str | int"]
"""What a server says to a request and its number: a text, or a status."""


class Server:
    """A server with OpenAI's interface, on loopback, whose answers are made up."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.under_way = self.most = 0
        self.location: str | None = None
        self.retry_after = "0.05"
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(body)
                    outer.keys.add(self.headers["Authorization"])
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                    number = len(outer.asked)
                said = answer(body, number)
                with lock:
                    outer.under_way -= 1
                message = {"role": "assistant", "content": said}
                choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                usage = {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After", outer.retry_after)
                if outer.location is not None:
                    self.send_header("Location", outer.location)
                self.end_headers()
                self.wfile.write(json.dumps(reply | {"choices": choices if said else []}).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        yield self
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    with Server(answer).running() as server:
        yield server


def judged(server: Server, completions: list[Any], **more: Any) -> list[Any]:
    more.setdefault("prompts", ["Q?"] * len(completions))
    return asyncio.run(judge(completions, url=server.url, model="m", **more))


def test_the_judge_sees_question_and_reply_and_its_last_number_is_the_reward() -> None:
    with serving(lambda body, number: "Between 3 and 9.\n8") as server:
        assert judged(server, ["It is {prompt}."]) == [0.8]
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    (message,) = body["messages"]
    assert message["role"] == "user" and message["content"].startswith(
        "Question:\nQ?\n\nReply:\nIt is {prompt}.\n\nHow"
    )


def test_columns_a_system_message_and_further_entries_reach_the_server() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    reply = [{"role": "assistant", "content": "A."}]
    with serving(lambda body, number: "4") as server:
        found = judged(
            server, [reply], prompts=[chat], answer=["B."], template="{prompt}|{completion}|{answer}", system="Judge.",
            low=1, high=5, extra={"top_k": 1},
        )  # fmt: skip
    assert found == [0.75]
    assert server.asked[0]["top_k"] == 1
    assert [one["content"] for one in server.asked[0]["messages"]] == ["Judge.", "system: Be brief.\n\nuser: Q?|A.|B."]


@pytest.mark.parametrize(
    ("answer", "settings", "expected"),
    [
        ("bad, no: good", {"choices": {"good": 1, "bad": -1}}, 1),
        ("goodness, bad", {"choices": {"good": 1, "bad": -1}}, -1),
        ("8/10", {}, 0.8),
        ("**8** / 10.", {}, 0.8),
        ("I give it 2 out of 10", {}, 0.2),
        ("3/100, no: 3 / 5", {"high": 5}, 0.6),
        ("7/100 or 8", {}, 0.8),
        ('{"score": 3} or {"why": "{", "score": 7.5}', {"field": "score"}, 0.75),
        ('So: {"score": "2"}!', {"field": "score", "high": 4}, 0.5),
    ],
)
def test_an_answer_may_be_a_choice_or_json(answer: str, settings: dict[str, Any], expected: float) -> None:
    with serving(lambda body, number: answer) as server:
        assert judged(server, ["A."], **settings) == [expected]


@pytest.mark.parametrize(
    ("answer", "settings", "said"),
    [
        ("hm", {}, "has no number from 0 to 10: 'hm'"),
        ("11", {}, "has no number from 0 to 10: '11'"),
        ("hm", {"choices": {"good": 1}}, "holds none of good: 'hm'"),
        ('{"points": 3}', {"field": "score"}, "does not end in the JSON that was asked for"),
        ('{"score": NaN}', {"field": "score"}, "has no number from 0 to 10"),
        ("[1, 2, 3]", {"together": True}, "does not end in the JSON"),
        ("[" * 9999, {"together": True}, "does not end in the JSON"),
        ("[" + "9" * 999 + "]", {"together": True}, "has no number from 0 to 10"),
        ("", {}, "answered without choices"),
        ("1", {"template": "{completion} {nothing}"}, "names 'nothing', which is no column"),
    ],
)
def test_what_cannot_be_read_is_no_reward(answer: str, settings: dict[str, Any], said: str) -> None:
    with serving(lambda body, number: answer) as server, pytest.raises(ValueError, match=said):
        judged(server, ["A."], **settings)


def test_replies_are_compared_by_one_question() -> None:
    with serving(lambda body, number: "Best first. [10, 0, 5]") as server:
        assert judged(server, ["a", "b", "c"], together=True) == [1, 0, 0.5]
    (body,) = server.asked
    assert "Reply 1:\na\n\nReply 2:\nb\n\nReply 3:\nc" in body["messages"][0]["content"]


def longer(body: dict[str, Any], number: int) -> str:
    """The verdict of a judge that likes long replies."""
    first, second = (part.split("\n\n")[0] for part in re.split("Reply [AB]:\n", body["messages"][0]["content"])[1:])
    return "It is longer.\n" + ("[[C]]" if len(first) == len(second) else "[[A]]" if first > second else "[[B]]")


def test_replies_are_compared_by_twos_in_both_orders() -> None:
    with serving(longer) as server:
        found = judged(server, ["a", "aaa", "a", "aa"], pairs=99)
    assert [one["score"] for one in found] == pytest.approx([1 / 6, 1, 1 / 6, 2 / 3])
    assert [one["consistency"] for one in found] == [1, 1, 1, 1]
    assert len(server.asked) == 2 * 6


def test_a_judge_that_likes_the_first_place_pays_nobody_for_it() -> None:
    with serving(lambda body, number: "[[A]]") as server:
        assert judged(server, ["a", "b", "c"], pairs=99) == [{"score": 0.5, "consistency": 0.0}] * 3


def test_pairs_bounds_what_is_asked_and_each_reply_is_compared() -> None:
    with serving(longer) as server:
        found = judged(server, ["a" * size for size in range(1, 6)], pairs=1)
    assert len(server.asked) == 2 * 3
    assert found[0]["score"] == 0 and found[4]["score"] == 1


def test_a_pair_that_cannot_be_read_in_both_orders_is_left_out() -> None:
    def unsure(hates: str) -> Answer:
        return lambda body, number: "hm" if hates in body["messages"][0]["content"] else longer(body, number)

    with serving(unsure("A:\naa\n\nReply B:\naaa\n")) as server:
        found = judged(server, ["aa", "a", "aaa"], pairs=99)
    assert [one["score"] for one in found] == [1, 0, 1]  # the two longer ones have met the short one alone
    with serving(unsure("B:\na\n")) as server, pytest.raises(ValueError, match=r"holds none of \[\[A\]\]"):
        judged(server, ["aa", "a", "aaa"], pairs=99)


def test_a_reply_that_is_alone_is_not_compared() -> None:
    with serving(longer) as server:
        assert judged(server, ["a"], pairs=4) == [None]
    assert server.asked == []


@pytest.mark.parametrize("count", range(1, 10))
def test_a_tournament_is_fair(count: int) -> None:
    everyone = list(itertools.combinations(range(count), 2))
    assert sorted(tuple(sorted(pair)) for pair in games(count, 99)) == everyone
    for most in range(1, len(everyone) + 1):
        pairs = games(count, most)
        met = Counter(one for pair in pairs for one in pair)
        assert len(pairs) == max(most, (count + 1) // 2) and len(met) == count
        assert max(met.values()) - min(met.values()) <= 2


def test_where_a_request_fails_the_others_of_the_group_are_not_sent() -> None:
    async def fail(server: Server) -> None:
        with pytest.raises(Exception, match=r"the server answered 400: .*choices"):
            await judge(["A."] * 8, ["Q?"] * 8, url=server.url, model="m", at_once=1)
        await asyncio.sleep(0.3)

    with serving(lambda body, number: 400) as server:
        asyncio.run(fail(server))
    assert len(server.asked) == 1


def test_votes_are_averaged_over_those_that_can_be_read() -> None:
    with serving(lambda body, number: {1: "4", 2: "?", 3: "8"}[number]) as server:
        (found,) = judged(server, ["A."], votes=3, at_once=1)
    assert found == pytest.approx(0.6)


def test_a_busy_server_is_asked_again_and_a_broken_one_given_up() -> None:
    with serving(lambda body, number: {1: 429, 2: 503}.get(number, "10")) as server:
        assert judged(server, ["A."]) == [1]
        assert len(server.asked) == 3
    with serving(lambda body, number: 500) as server, pytest.raises(Exception, match="500"):
        judged(server, ["A."], retries=1)
    assert len(server.asked) == 2
    with pytest.raises(Exception, match="no connection to the server"):
        judged(server, ["A."], retries=0)  # it is gone


@pytest.mark.parametrize(("asked", "least"), [("nan", 0.25), ("soon", 0.25), ("Thu, 01 Jan 2015 00:00:00 GMT", 0.0)])
def test_a_server_may_ask_for_any_pause(asked: str, least: float) -> None:
    with serving(lambda body, number: {1: 429}.get(number, "10")) as server:
        server.retry_after = asked
        start = time.monotonic()
        assert judged(server, ["A."]) == [1]
        assert time.monotonic() - start >= least


@pytest.mark.parametrize("status", [302, 307])
def test_where_a_server_leads_elsewhere_nothing_is_sent_there(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret\n")  # as a file with a key ends
    with serving(lambda body, number: "8") as other, serving(lambda body, number: status) as server:
        server.location = f"{other.url}/chat/completions"
        with pytest.raises(ServerError, match=f"answered {status}: {other.url}/chat/completions"):
            judged(server, ["A."], key="JUDGE_KEY")
    assert other.asked == [] and len(server.asked) == 1 and server.keys == {"Bearer secret"}


def test_an_answer_that_is_no_text_is_the_servers_fault() -> None:
    said: Any = [{"type": "text", "text": "8"}]
    with (
        serving(lambda body, number: said) as server,
        pytest.raises(ServerError, match="the server's answer is none of OpenAI's"),
    ):
        judged(server, ["A."])


def test_a_proxy_may_be_named_without_http(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda body, number: "8") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://").removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        found = asyncio.run(judge(["A."], ["Q?"], url="http://judge.invalid/v1", model="m", retries=0))
    assert found == [0.8]


def test_no_more_are_under_way_than_may_be() -> None:
    def slow(body: dict[str, Any], number: int) -> str:
        time.sleep(0.05)
        return "5"

    with serving(slow) as server:
        assert judged(server, ["A."] * 12, at_once=3) == [0.5] * 12
    assert server.most == 3


def test_requests_and_tokens_are_spread_over_time() -> None:
    with serving(lambda body, number: "5") as server:
        for settings in ({"requests_per_minute": 600}, {"tokens_per_minute": 18000, "at_once": 1}):
            start = time.monotonic()
            judged(server, ["A."] * 4, **settings)
            assert time.monotonic() - start >= 0.29  # 3 x 0.1 s, 3 x 30 tokens at 300 a second


def test_a_cache_asks_nothing_twice(tmp_path: Path) -> None:
    cache = str(tmp_path / "judge.sqlite")
    with serving(lambda body, number: str(number)) as server:
        first = judged(server, ["a", "b"], cache=cache, at_once=1, votes=2)
        asked = len(server.asked)
        assert judged(server, ["b", "a"], cache=cache, votes=2) == [first[1], first[0]]
        assert len(server.asked) == asked
        judged(server, ["b"], cache=cache, temperature=0.5)
        assert len(server.asked) == asked + 1


def test_a_cache_on_a_full_disk_costs_no_reward(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = str(tmp_path / "judge.sqlite")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(lambda body, number: "x" * 100_000 + f" {number}") as server:
        judged(server, [], cache=cache)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
        try:
            assert judged(server, ["a", "b"], cache=cache, at_once=1) == [0.1, 0.2]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told = f"judge: the cache '{cache}' cannot be written, answers are not kept: "
        assert capfd.readouterr().out.count(told) == 1
        assert judged(server, ["a"], cache=cache) == [0.3]


def test_only_what_can_be_read_is_kept(tmp_path: Path) -> None:
    cache = str(tmp_path / "judge.sqlite")
    with serving(lambda body, number: {1: "hm", 2: "good"}.get(number, "4")) as server:
        with pytest.raises(ValueError, match="no number"):
            judged(server, ["a"], cache=cache)
        assert judged(server, ["a"], cache=cache, choices={"good": 1}) == [1]
        assert judged(server, ["a"], cache=cache) == [0.4]  # "good" is no number: it is asked again
        assert judged(server, ["a"], cache=cache) == [0.4]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"key": "OTHER_KEY"}, r"judge: there is no environment variable 'OTHER_KEY'; name it in reward\.env too"),
        ({"cache": "/nowhere/judge.sqlite"}, "judge: the cache '/nowhere/judge.sqlite' cannot be written: unable to"),
        ({"template": "{completion} {anwser}"}, r"'quality' \(judge\) needs 'anwser', .* did you mean 'answer'"),
    ],
)
def test_what_a_judge_lacks_is_told_before_a_model_is_loaded(args: dict[str, Any], said: str) -> None:
    given = {"url": "http://127.0.0.1:1/v1", "model": "m"} | args
    config = RewardConfig(functions={"quality": RewardFunctionConfig("judge", args=given)})
    with pytest.raises(UserError, match=said), RewardPool(config) as pool:
        pool.check_columns(["answer"], "the data")


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(lambda body, number: "5") as server:
        judged(server, ["A."], key="JUDGE_KEY")
        assert server.keys == {"Bearer secret"}
        with pytest.raises(UserError, match=r"no environment variable 'OTHER_KEY'; name it in reward\.env too"):
            judged(server, ["A."], key="OTHER_KEY")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000', must begin with http"),
        ({"url": "http:///v1"}, "url is 'http:///v1', which has no usable host and port"),
        ({"url": "http://a:99999/v1"}, "url is 'http://a:99999/v1', which has no usable host and port"),
        ({"url": "http://a..b/v1"}, "url is 'http://a..b/v1', which has no usable host and port"),
        ({"url": "http://me:sk-123@a/v1"}, "url holds a user or password"),
        ({"low": 3, "high": 3}, "low is 3, must be below high, 3"),
        ({"choices": {}}, "choices is empty"),
        ({"choices": {"a": 1}, "field": "b"}, "only one of choices, field and together"),
        ({"template": "{prompt}"}, r"template does not hold \{completion\}"),
        ({"template": "{completion}", "together": True}, r"template does not hold \{completions\}"),
        ({"votes": 0}, "votes, at_once and max_tokens"),
        ({"requests_per_minute": 0}, "must be above 0"),
        ({"together": True}, r"reward\.functions\.quality\.scope: is sample, but with together=true it must be group"),
        ({"choices": {"good": "x"}}, "choices must be words with a number each"),
        ({"choices": {True: 1, False: 0}}, r"\(yes, no\) in quotes"),
        ({"extra": 3}, "extra is 3, must be entries of a request"),
        ({"key": "sk-123"}, "key must be the name of an environment variable"),
        ({"modle": "m"}, "model"),
        ({"pairs": 0}, "pairs is 0, must be at least 1"),
        ({"pairs": 4}, r"reward\.functions\.quality\.scope: is sample, but with pairs=4 it must be group"),
        ({"pairs": 4, "together": True}, "only one of together and pairs"),
        ({"pairs": 4, "template": "{first}"}, r"template does not hold \{second\}"),
        ({"pairs": 4, "choices": {"A": 1, "B": -1}}, "with pairs choices must pay the first reply from 0 to 1"),
    ],
)
def test_settings_are_checked_before_anything_runs(args: dict[str, Any], said: str) -> None:
    given = {"url": "http://127.0.0.1:1/v1", "model": "m"} | args
    with pytest.raises(UserError, match=said) as found:
        check_function("quality", RewardFunctionConfig("judge", args=given))
    assert "sk-123" not in str(found.value)


def test_many_groups_are_judged_at_the_same_time(tmp_path: Path) -> None:
    def slow(body: dict[str, Any], number: int) -> str:
        time.sleep(0.2)
        return "0" if "bad" in body["messages"][0]["content"] else "10"

    groups = [group(index, ["good", "bad", "good", "good"]) for index in range(8)]
    with serving(slow) as server:
        args = {"url": server.url, "model": "m"}
        config = RewardConfig(functions={"quality": RewardFunctionConfig("judge", args=args)})
        with RewardPool(config, tmp_path / "log") as pool:
            assert rewards(pool.score(groups).groups, "quality") == [[1, 0, 1, 1]] * 8
    assert server.most > 8
