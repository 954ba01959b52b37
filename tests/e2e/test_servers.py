"""Rollout servers: real `sapo-serve` processes on the CPU, weights over a real group, and a server that dies."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import forked
import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from command import finish, folders, free_port, records, steps_of, wait_for_step
from openai import AuthenticationError, BadRequestError, DefaultHttpxClient, OpenAI
from tiny import logps_of, make_workspace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from waiting import until

from sapo_rl.config import RolloutConfig
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.engines.parity import verify, verify_all
from sapo_rl.engines.remote import RemoteEngine, RemoteSettings
from sapo_rl.errors import EngineLost
from sapo_rl.rollout.collector import Rollouts
from sapo_rl.rollout.dispatch import Answer, Dispatcher
from sapo_rl.types import Prompt
from sapo_rl.weights.broadcast import NcclTransport

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
EOS = 3
PROBE = "mismatch/probe_logp_diff"
WARM = Sampling(0.7, 1.0, 0, 0.0, 1.0, 24, True)


@dataclass
class Server:
    """A `sapo-serve` process on a port of its own."""

    folder: Path
    port: int
    environment: dict[str, str]
    process: forked.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.port}.log"

    def start(self) -> None:
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "sapo_rl.run.serve", "--port", str(self.port)]
            command += ["--episodes", "config=tiny.yaml"]
            self.process = forked.Popen(
                command, server="engines", cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """As a crash would: without a word, and with nothing left of it."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_workspace(
        tmp_path_factory.mktemp("workspace"),
        tiny_model,
        rollout={"batch_size": 128, "max_completion_tokens": 128, "max_num_seqs": 16, "verify_every": 1},
        environment={"max_tokens": 128},  # of the agents' episodes
        trainer={"steps": 3},
        eval={"every": 0, "prompts": 0},
        checkpoint={"every": 0, "save_final": False},
        logging={"wandb": "off"},
    )


@pytest.fixture(scope="module")
def environment(workspace: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "SAPO_API_KEY"}
    return kept | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(workspace / "home")}


@pytest.fixture(scope="module")
def servers(workspace: Path, environment: dict[str, str]) -> Iterator[list[Server]]:
    """Two servers that start side by side; they get one key."""
    started = [Server(workspace, free_port(), environment) for _ in range(2)]
    yield started
    for server in started:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="module")
def key(servers: list[Server], workspace: Path) -> str:
    path = workspace / "home" / "sapo-train" / "api_key"
    until(path.exists, 300)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path.read_text().strip()


@pytest.fixture(scope="module")
def fleet(servers: list[Server], key: str) -> Iterator[list[RemoteEngine]]:
    settings = [RemoteSettings(server.address, key, "float32", 192, [EOS], 900.0, 120.0) for server in servers]
    engines = [RemoteEngine(one) for one in settings]
    for engine in engines:
        engine.wait_ready()
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def transport() -> Iterator[NcclTransport]:
    made = NcclTransport(torch.float32, "cpu", os.urandom(4).hex(), sends=True, seconds=120.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PreTrainedModel:
    """Other weights in every tensor than those in the model's folder."""
    return noisy(tiny_model, 1)


def noisy(tiny_model: Path, seed: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def answers(engine: RemoteEngine, requests: list[Request], sampling: Sampling) -> dict[int, list[Completion]]:
    return {i: future.result(120) for i, future in enumerate(engine.submit(requests, sampling))}


def test_every_path_takes_the_key_and_the_key_is_nowhere_to_be_seen(
    servers: list[Server], key: str, fleet: list[RemoteEngine]
) -> None:
    paths = ["/", "/health", "/metrics", "/docs", "/v1/models", "/v1/completions", "/collective_rpc", "/sapo/info"]
    paths += ["/v1/chat/completions", "/episodes", "/episodes/one"]
    base_url = f"http://{servers[0].address}"
    with httpx.Client(base_url=base_url, trust_env=False) as client:
        for path in [*paths, "/sapo/load", "/update_weights", "/sleep", "/inference/v1/generate", "/no/such"]:
            for wrong in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": key}):
                for method in ("GET", "POST", "OPTIONS"):
                    assert client.request(method, path, headers=wrong).status_code == 401, (method, path)
    with httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {key}"}) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert client.post("/collective_rpc", json={"method": "receive_shared", "args": ["x"]}).status_code == 404
    for server in servers:
        process = psutil.Process(server.process.pid)
        listens = [one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert ("127.0.0.1", server.port) in listens
        assert key not in server.log.read_text()
        for one in [process, *process.children(recursive=True)]:
            assert key not in " ".join(one.cmdline())


def test_a_call_that_vllm_would_hang_on_is_refused_and_the_server_writes_on(
    servers: list[Server], key: str, fleet: list[RemoteEngine], transport: NcclTransport, policy: PreTrainedModel
) -> None:
    transport.push(policy.named_parameters(), fleet[:1], 1)
    good: dict[str, Any] = {
        "weight_id": fleet[0].weight_id,
        "token_ids": [2, 30],
        "n": 2,
        "seed": 5,
        "stop_token_ids": [EOS],
    }
    good |= {"sampling": asdict(WARM)}
    wrong = [
        {"token_ids": [2, 1.5]},
        {"token_ids": [2, 10**6]},
        {"token_ids": [2] * 192},
        {"n": 10**9},
        {"seed": 2**70},
        {"stop_token_ids": list(range(200)) * 20},
        {"sampling": asdict(replace(WARM, temperature=1e-30))},
    ]
    headers = {"Authorization": f"Bearer {key}"}
    url = f"http://{servers[0].address}"
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=120.0) as client:
        for change in wrong:
            assert client.post("/sapo/generate", json=good | change).status_code == 400, change
        for path in ("/sapo/generate", "/v1/completions"):
            assert client.post(path, content=b"{").status_code == 400
        assert len(client.post("/sapo/generate", json=good).json()["completions"]) == 2
        (served,) = client.get("/v1/models").json()["data"]
        text = client.post("/v1/completions", json={"model": served["id"], "prompt": "1+1", "max_tokens": 2})
        assert text.status_code == 200
        assert client.get("/health").status_code == 200


def test_servers_write_what_the_trainers_weights_say(
    fleet: list[RemoteEngine], transport: NcclTransport, policy: PreTrainedModel
) -> None:
    transport.push(policy.named_parameters(), fleet, 7)
    requests = [Request([2, 30 + i, 40, 50 + i], 3, seed=100 * i) for i in range(6)]
    first, second = (answers(engine, requests, WARM) for engine in fleet)
    assert {i: [one.token_ids for one in group] for i, group in first.items()} == {
        i: [one.token_ids for one in group] for i, group in second.items()
    }
    assert len({tuple(one.token_ids) for group in first.values() for one in group}) > 15  # of 18
    for i, group in first.items():
        prompt = requests[i].token_ids
        for one in group:
            assert one.truncated == (one.token_ids[-1] != EOS)
            expected = logps_of(policy, prompt + one.token_ids, WARM.temperature)[len(prompt) - 1 :]
            assert one.logps == pytest.approx(expected, abs=1e-4)
    turns = [answers(fleet[0], [Request([2, *range(5, 90), *range(5, 70)], 1)], WARM)[0][0] for _ in range(2)]
    assert [one.cached for one in turns] == [0, 128]  # a whole block of vLLM's cache
    expected = logps_of(policy, list(range(5, 60)))
    assert max(verify_all(fleet, list(range(5, 60)), expected, "float32")) < 1e-5
    transport.close()  # else it would bring them
    fleet[0].expect("another run/7", 7)
    with pytest.raises(EngineLost, match="holds the weights"):
        answers(fleet[0], requests, WARM)
    assert len(verify_all(fleet, list(range(5, 60)), expected, "float32")) == 1


ADD: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}


def client_of(server: Server, key: str, session: str) -> OpenAI:
    http = DefaultHttpxClient(trust_env=False)
    headers = {"X-Session-Id": session}
    return OpenAI(base_url=f"http://{server.address}/v1", api_key=key, default_headers=headers, http_client=http)


def test_agents_that_no_run_starts_are_recorded_with_the_weights_that_wrote_them(
    servers: list[Server],
    key: str,
    fleet: list[RemoteEngine],
    transport: NcclTransport,
    policy: PreTrainedModel,
    tiny_model: Path,
) -> None:
    newer = noisy(tiny_model, 5)
    transport.push(policy.named_parameters(), fleet[:1], 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def play(session: str, until_turn: int, messages: list[Any]) -> list[Any]:
        """Ask up to that turn, each time after a tool's answer; returns what was said of each reply."""
        said = []
        with client_of(servers[0], key, session) as client:
            while len(messages) < 2 * until_turn:
                reply = client.chat.completions.create(model="m", messages=messages, tools=[ADD], max_tokens=12)
                messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": "1", "content": session}]
                said.append(reply)
        return said

    chats: dict[str, list[Any]] = {name: [{"role": "user", "content": f"I am {name}."}] for name in ("one", "two")}
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(play, name, 2, messages) for name, messages in chats.items()]
        said = {name: future.result(120) for name, future in zip(chats, asked, strict=True)}
    transport.push(newer.named_parameters(), fleet[:1], 2)
    for name, messages in chats.items():
        said[name] += play(name, 3, messages)

    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=f"http://{servers[0].address}", headers=headers, trust_env=False) as http:
        for name, replies in said.items():
            episode = http.get(f"/episodes/{name}").json()
            (row,) = episode["rows"]
            assert row["prompt_ids"] == tokenizer.apply_chat_template(
                chats[name][:1], add_generation_prompt=True, return_dict=False
            )
            stream, prompt = row["prompt_ids"] + row["token_ids"], len(row["prompt_ids"])
            run = fleet[0].weight_id.partition("/")[0]
            assert [turn["weights"] for turn in episode["turns"]] == [[f"{run}/{version}"] * 2 for version in (1, 1, 2)]
            logps = iter(row["rollout_logps"])
            scores = fleet[0].score(stream)
            for turn, reply in zip(episode["turns"], replies, strict=True):
                start, end = prompt + turn["start"], prompt + turn["end"]
                assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (start, end - start)
                assert tokenizer.decode(stream[start:end], skip_special_tokens=True) == reply.choices[0].message.content
                model = policy if turn["weights"][0].endswith("/1") else newer
                expected = logps_of(model, stream)[start - 1 : end - 1]
                found = [next(logps) for _ in range(start, end)]
                differences = [abs(one - other) for one, other in zip(found, expected, strict=True)]
                assert sum(differences) / len(differences) < 1e-5
                if model is newer:  # the server's own weights by now
                    assert found == pytest.approx(scores[start - 1 : end - 1], abs=1e-5)
            assert next(logps, None) is None
            told = tokenizer.decode(stream)
            assert f"I am {name}." in told and told.count(f"tool\n{name}<") == 2
            assert not any(f"\n{other}<" in told or f"I am {other}" in told for other in chats if other != name)
            assert http.delete(f"/episodes/{name}").status_code == 200
            assert http.get(f"/episodes/{name}").status_code == 404
    with client_of(servers[0], key, "three") as client, pytest.raises(BadRequestError, match=r"must be 1 as rollout"):
        client.chat.completions.create(model="m", messages=chats["one"][:1], temperature=0.5)
    with client_of(servers[0], f"{key}x", "three") as client, pytest.raises(AuthenticationError, match="wrong or mis"):
        client.chat.completions.create(model="m", messages=chats["one"][:1])


def test_a_run_that_sends_some_weights_gets_the_others_from_the_models_folder(
    fleet: list[RemoteEngine], transport: NcclTransport, policy: PreTrainedModel, tiny_model: Path
) -> None:
    mixed = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    some = {name: weight for name, weight in policy.named_parameters() if "down_proj" in name}
    mixed.load_state_dict(some, strict=False)
    earlier = NcclTransport(torch.float32, "cpu", "earlier", sends=True, seconds=120.0)
    earlier.push(policy.named_parameters(), fleet, 1)
    earlier.close()
    transport.push(some.items(), fleet, 1)
    tokens = list(range(5, 60))
    assert len(verify_all(fleet, tokens, logps_of(mixed, tokens), "float32")) == 2


def test_a_server_works_for_one_run_at_a_time(
    fleet: list[RemoteEngine], transport: NcclTransport, policy: PreTrainedModel, tiny_model: Path
) -> None:
    """The second run waits; it gets the server when the first one ends."""
    tokens, newer = list(range(5, 60)), noisy(tiny_model, 3)
    transport.push(policy.named_parameters(), fleet[:1], 1)
    late = RemoteEngine(fleet[0].settings)
    waiting = NcclTransport(torch.float32, "cpu", "late", sends=True, seconds=120.0)
    waiting.push(newer.named_parameters(), [late], 1)
    time.sleep(3)  # it asks every second
    with pytest.raises(EngineLost, match="holds the weights"):
        answers(late, [Request([2, 30], 1)], WARM)
    assert verify(fleet[0], tokens, logps_of(policy, tokens), "float32") < 1e-5
    transport.close()
    until(lambda: late.restarts == 1, 60)
    assert verify(late, tokens, logps_of(newer, tokens), "float32") < 1e-5
    waiting.close()


@torch.no_grad()
def likeliest(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != EOS:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_server_writes_on_while_it_gets_new_weights(
    fleet: list[RemoteEngine], transport: NcclTransport, policy: PreTrainedModel, tiny_model: Path
) -> None:
    engine, newer = fleet[0], noisy(tiny_model, 4)
    prompt = [5 + i % 200 for i in range(140)]  # longer than a block of the key-value cache, so that it is cached
    greedy, long = (Sampling(one, 1.0, 0, 0.0, 1.0, 24 if one == 0 else 64, False) for one in (0.0, 1.0))
    dispatcher = Dispatcher([engine], 64, 60.0)
    transport.push(policy.named_parameters(), [engine], 1)
    others: list[Future[Answer]] = []
    for version, model in enumerate((newer, policy), start=2):
        begun = dispatcher.submit_all(
            [Request([2, 30 + i, version], 4) for i in range(24)], long
        )  # six times its seats
        others += begun
        until(begun[0].done, 60)
        transport.push(model.named_parameters(), [engine], version)
        assert not others[-1].done()  # it waits, or is written by weights of two versions
        for _ in range(2):  # the second time by what the cache has
            assert answers(engine, [Request(prompt, 1)], greedy)[0][0].token_ids == likeliest(model, prompt, 24)
        assert verify(engine, prompt, logps_of(model, prompt), "float32") < 1e-5
    found = [future.result(120) for future in others]
    assert {len(answer.completions) for answer in found} == {4}
    assert any(answer.newest_version > answer.oldest_version for answer in found)
    assert {answer.oldest_version for answer in found} <= {1, 2, 3}
    assert engine.restarts == 0


def test_one_of_two_dies_in_mid_batch_and_is_taken_back_with_current_weights(
    servers: list[Server],
    fleet: list[RemoteEngine],
    transport: NcclTransport,
    policy: PreTrainedModel,
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    transport.push(policy.named_parameters(), fleet, 1)
    answered: Counter[int] = Counter()

    def take(number: int, done: Future[Answer]) -> None:
        assert len(done.result().completions) == 4
        answered[number] += 1
        if done.result().engine == 1 and servers[1].process.poll() is None:
            servers[1].kill()  # most of its requests still wait for their turn

    requests = [Request([2, 30 + i, 40], 4) for i in range(40)]
    asked = Dispatcher(fleet, 80, 60.0).submit_all(requests, Sampling(1.0, 1.0, 0, 0.0, 1.0, 64, False))
    for number, future in enumerate(asked):
        future.add_done_callback(partial(take, number))
    assert {future.result(120).engine for future in asked} == {0, 1}
    assert sum(future.result().engine == 0 for future in asked) > 20  # some that server 1 had begun
    until(lambda: answered == Counter(range(40)), 10)
    (told,) = [record.message for record in caplog.records if record.name.startswith("sapo_rl")]
    assert f"{servers[1].address} does not answer" in told

    newer = noisy(tiny_model, 2)
    transport.push(newer.named_parameters(), fleet, 2)
    restarts = fleet[1].restarts
    servers[1].start()
    until(lambda: fleet[1].restarts == restarts + 1, 300)
    tokens = list(range(5, 60))
    assert verify(fleet[1], tokens, logps_of(newer, tokens), "float32") < 1e-5
    rollouts = Rollouts(
        fleet,
        RolloutConfig(group_size=4, max_completion_tokens=64),  # long enough for both to be asked
        AutoTokenizer.from_pretrained(tiny_model),
        seed=0,
        reproducible=False,
    )
    groups, usage, _ = rollouts.write([Prompt(i, [2, 30 + i], "", {}) for i in range(40)], step=1)
    assert {sample.versions for group in groups for sample in group.samples} == {(2, 2)}
    assert all(seconds > 0 for seconds in usage.until)


def test_a_run_has_its_batches_written_over_new_weights(
    workspace: Path,
    environment: dict[str, str],
    servers: list[Server],
    fleet: list[RemoteEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SAPO_API_KEY", raising=False)
    how = ("rollout.batch_size=32", "rollout.max_staleness=2", "trainer.steps=5", "reproducible=false")
    address, home = f"rollout.servers=[{servers[0].address}]", {"XDG_CONFIG_HOME": environment["XDG_CONFIG_HOME"]}
    code, out, err = forked.run(workspace, "config=tiny.yaml", address, *how, "run_dir=in_flight", **home)
    assert code == 0, out + err
    steps = steps_of(workspace / "in_flight")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert steps[0]["rollout/staleness"] == 0
    assert all(1 <= record["rollout/staleness"] <= 2 for record in steps[2:])
    assert not any("rollout/idle_fraction" in record for record in steps)  # no engine waits for a batch to end
    probes = [
        record["mismatch/probe_logp_diff"]
        for record in records(workspace / "in_flight")
        if "mismatch/probe_logp_diff" in record
    ]
    assert len(probes) == 6 and max(probes) < 1e-4


def test_a_run_of_two_ranks_goes_on_when_a_server_dies(
    workspace: Path,
    environment: dict[str, str],
    servers: list[Server],
    fleet: list[RemoteEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SAPO_API_KEY", raising=False)
    addresses = ",".join(server.address for server in servers)
    process = forked.launch(
        workspace, "config=tiny.yaml", f"rollout.servers=[{addresses}]", "launch=ddp", "launch.num_processes=2",
        "rollout.batch_size=64", "rollout.max_completion_tokens=48", XDG_CONFIG_HOME=environment["XDG_CONFIG_HOME"],
    )  # fmt: skip
    folder = wait_for_step(process, workspace, set(), 1)
    servers[1].process.send_signal(signal.SIGSTOP)  # the next batch is being written, and now waits for it
    time.sleep(1.0)
    servers[1].kill()
    code, out, err = finish(process)
    assert code == 0, out + err
    assert f"{servers[1].address} does not answer" in err
    assert folders(workspace) == {folder}
    steps = steps_of(folder)
    assert [record["rollout/staleness"] for record in steps] == [0, 1, 1]  # ahead of the training, but for the first
    assert all(0 <= record["rollout/idle_fraction"] < 1 for record in steps)
    assert len([record for record in records(folder) if "mismatch/probe_logp_diff" in record]) == 4
    for path in sorted((folder / "completions").glob("*.parquet")):
        table = pq.read_table(path)
        assert table.num_rows == 64
        assert sorted(Counter(table.column("prompt").to_pylist()).values())[0] >= 4
        assert all(count % 4 == 0 for count in Counter(table.column("prompt").to_pylist()).values())
