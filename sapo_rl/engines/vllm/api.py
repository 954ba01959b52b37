"""What a rollout server answers beside vLLM's own paths, and the guard of all paths. Runs inside vLLM's server.

vLLM's own key guards some of its paths only, and the paths that replace weights exist in its development mode, where
they run any method of the worker. This takes a key on every path and adds the few calls that a trainer needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from sapo_rl.engines.asgi import App, Receive, Scope, Send, bearer, gather, gone, send_json
from sapo_rl.engines.base import Completion, Request, Sampling
from sapo_rl.engines.key import VARIABLE
from sapo_rl.engines.vllm.adapter import completions_of, sampling_params, scores_of, scoring_params
from sapo_rl.engines.vllm.bodies import (
    MOST_BYTES,
    Body,
    GenerateBody,
    InfoBody,
    JoinBody,
    LeaveBody,
    LoadBody,
    SamplingBody,
    ScoreBody,
    what_is_wrong,
)
from sapo_rl.engines.vllm.held import HeldWeights, OtherWeights, run_of
from sapo_rl.engines.vllm.pulse import Pulse
from sapo_rl.weights.rendezvous import Rendezvous

logger = logging.getLogger("vllm.sapo")

Method = Callable[..., Awaitable[dict[str, Any]]]

NOT_UNDERSTOOD, WRONG_KEY, UNKNOWN, NOT_SO, NOT_THOSE_WEIGHTS, TOO_LARGE = 400, 401, 404, 405, 409, 413
FAILED, DEAD = 500, 503
OWNED_SECONDS = 10.0
"""A run that was not heard of for so long is over: the next one may have the server. Trainers ask every second."""
SILENT = "vLLM's core does not answer any more; start the server anew"


class TrainerApi:
    """ASGI middleware around vLLM's server: `/sapo/<method>` calls the method of that name below, JSON in and out.

    The trainer gives weights an id, `<run>/<version>`. A request names the weight_id that it wants completions from and
    goes on while newer weights are loaded. Where the server has older weights, or another run's, and none that will do
    are on their way, it is refused: a server that was restarted, or that another run took over, gives no wrong answer.
    It works for one run at a time.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.key = os.environ[VARIABLE].encode()
        self.held = HeldWeights()
        self.others = False
        """Whether vLLM's own paths were asked for something since its cache was last emptied."""
        self.changed = False
        """Whether any weights are not those of the model's folder."""
        self.meeting: str | None = None
        """Name of the group with the trainer."""
        self.owner = ""
        """The run that the server works for; empty is none."""
        self.heard = 0.0
        """When its trainer last asked for something."""
        self.pulse = Pulse()
        self.methods: dict[str, tuple[Method, type[Body]]] = {
            "/sapo/info": (self.info, InfoBody),
            "/sapo/generate": (self.generate, GenerateBody),
            "/sapo/score": (self.score, ScoreBody),
            "/sapo/join": (self.join, JoinBody),
            "/sapo/load": (self.load, LoadBody),
            "/sapo/leave": (self.leave, LeaveBody),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, pass it on to vLLM, or refuse it."""
        if scope["type"] == "lifespan":
            feeling = asyncio.ensure_future(self.pulse.feel(scope["app"].state.engine_client))
            try:
                await self.app(scope, receive, send)
            finally:
                feeling.cancel()
        elif not (self.key and hmac.compare_digest(bearer(scope), self.key)):
            await _refuse(scope, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif (body := await gather(receive, MOST_BYTES)) is None:
            await send_json(send, TOO_LARGE, {"error": f"the body has more than {MOST_BYTES} bytes"})
        elif scope["path"].startswith("/sapo/"):
            await self._answer(scope, body, receive, send)
        else:
            await self.pass_on(scope, body, receive, send)

    async def pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Answer a request that is none of a trainer's and has the key: vLLM does."""
        if scope["path"] == "/health" and self.pulse.lost:
            await send_json(send, DEAD, {"error": SILENT})
        else:
            self.others = self.others or scope["method"] == "POST"
            await self.app(scope, _again(body, receive), send)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Call the method that the path names, and stop it where the client goes away."""
        if scope["path"] not in self.methods:
            await send_json(send, UNKNOWN, {"error": f"no such path; valid: {', '.join(self.methods)}"})
            return
        if scope["method"] != "POST":
            await send_json(send, NOT_SO, {"error": f"{scope['path']} takes POST, not {scope['method']}"})
            return
        call = asyncio.ensure_future(self._call(scope["path"], scope["app"].state.engine_client, body))
        left = asyncio.ensure_future(gone(receive))
        await asyncio.wait((call, left), return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if call.done():
            await send_json(send, *call.result())
        else:
            call.cancel()

    async def _call(self, path: str, engine: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        method, schema = self.methods[path]
        try:
            arguments = schema.model_validate_json(body or b"{}")
        except ValidationError as error:
            return NOT_UNDERSTOOD, {"error": what_is_wrong(error)}
        try:
            with self.worded():
                return 200, await method(engine, **dict(arguments))
        except CallFailed as failed:
            return failed.status, {"error": str(failed)}

    @contextlib.contextmanager
    def worded(self) -> Iterator[None]:
        """Surround what the engine is asked for. Raises CallFailed for whatever keeps it from answering."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.pulse.lost:
            raise CallFailed(DEAD, SILENT)
        try:
            yield
        except _Misfit as misfit:
            raise CallFailed(NOT_UNDERSTOOD, str(misfit)) from misfit
        except OtherWeights as other:
            raise CallFailed(NOT_THOSE_WEIGHTS, str(other)) from other
        except EngineDeadError as error:
            raise CallFailed(DEAD, f"vLLM's core died: {error}") from error
        except Exception as error:  # the client has to know why: the same call would fail again
            logger.exception("a call failed")
            raise CallFailed(FAILED, traceback.format_exc(limit=-4)) from error

    async def info(self, engine: Any, run: str) -> dict[str, Any]:
        """Say which weights are held, and what does not change; the run that asks is still there."""
        if run == self.owner:
            self.heard = time.monotonic()
        settings = engine.vllm_config
        return {
            "weight_id": self.held.weight_id,
            "meeting": self.meeting,
            "workers": settings.parallel_config.world_size,
            "device": settings.device_config.device_type,
            "model": settings.model_config.model,
            "dtype": str(settings.model_config.dtype).removeprefix("torch."),
            "max_model_len": settings.model_config.max_model_len,
        }

    async def generate(
        self,
        engine: Any,
        weight_id: str,
        token_ids: list[int],
        n: int,
        seed: int | None,
        sampling: SamplingBody,
        stop_token_ids: list[int],
    ) -> dict[str, Any]:
        """Complete one prompt `n` times."""
        request = Request(token_ids, n, seed)
        written = await self.complete(engine, weight_id, request, Sampling(**dict(sampling)), stop_token_ids)
        return {"completions": [asdict(one) for one in written]}

    async def complete(
        self, engine: Any, weight_id: str, request: Request, sampling: Sampling, stop_token_ids: list[int]
    ) -> list[Completion]:
        """Return the completions of a request. Raises what `worded` words."""
        _check_tokens(engine, "stop_token_ids", stop_token_ids)
        params = sampling_params(request, sampling, stop_token_ids)
        return completions_of(await self._run(engine, weight_id, request.token_ids, params))

    async def score(self, engine: Any, weight_id: str, token_ids: list[int]) -> dict[str, Any]:
        """Return log p(token | those before it) of all tokens but the first."""
        output = await self._run(engine, weight_id, token_ids, scoring_params())
        return {"logps": scores_of(output)}

    async def _run(self, engine: Any, weight_id: str, token_ids: list[int], params: Any) -> Any:
        if len(token_ids) >= (longest := engine.vllm_config.model_config.max_model_len):
            raise _Misfit(f"token_ids: has {len(token_ids)} tokens, must have fewer than {longest}")
        _check_tokens(engine, "token_ids", token_ids)
        last = None
        async with self.held.writing(weight_id):
            # What the cache holds of a prompt belongs to the weights that wrote it.
            prompt = {"prompt_token_ids": token_ids, "cache_salt": self.held.salt}
            async for output in engine.generate(prompt, params, uuid.uuid4().hex):
                last = output
        return last

    async def join(self, engine: Any, name: str, meeting: Rendezvous) -> dict[str, Any]:
        """Have the workers come together with the trainer, and go back to the weights of the model's folder."""
        run, now = run_of(name), time.monotonic()
        if self.owner not in ("", run) and now - self.heard < OWNED_SECONDS:
            raise OtherWeights("is in use by another run")
        self.owner, self.heard = run, now
        await self.held.give_up()
        with self.pulse.occupied():
            if self.changed:
                await engine.collective_rpc("restore")
                self.changed = False
            await self.held.restored()
            await engine.collective_rpc("join_group", args=(meeting.to_json(),))
        self.meeting = name
        return {}

    async def load(self, engine: Any, meeting: str, weight_id: str, layout: str) -> dict[str, Any]:
        """Receive weights, between two steps of what is being written."""
        if meeting != self.meeting:
            raise OtherWeights(f"is in the group {self.meeting}, not {meeting}")
        self.changed = True
        async with self.held.arriving(weight_id):
            with self.pulse.occupied():
                await engine.collective_rpc("receive_broadcast", args=(layout,))
            # What came by vLLM's own paths is cached without the name of its weights: it begins anew with the new ones.
            if self.others and not await engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM did not reset its prefix cache")
            self.others = False
        return {}

    async def leave(self, engine: Any, run: str) -> dict[str, Any]:
        """Be free for the next run."""
        if run == self.owner:
            self.owner = ""
        return {}


class CallFailed(Exception):
    """Why a call has no answer, with its status."""

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status = status


class _Misfit(Exception):
    """A call asks for what this model cannot do."""


def _check_tokens(engine: Any, name: str, token_ids: list[int]) -> None:
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    if token_ids and (largest := max(token_ids)) >= vocabulary:
        raise _Misfit(f"{name}: {largest} is no token of this model, they are below {vocabulary}")


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, then what else comes."""
    whole = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> MutableMapping[str, Any]:
        return whole.pop() if whole else await receive()

    return give


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await send_json(send, WRONG_KEY, {"error": "wrong or missing API key: Authorization: Bearer <key>"})
