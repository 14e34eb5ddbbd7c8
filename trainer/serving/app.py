"""The HTTP server: the demo page, its endpoints, and `POST /recommend`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from time import perf_counter
from typing import Any

import numpy as np
from aiohttp import web

from etl.runtime.errors import InputError
from trainer.program_configs import ServeConfig
from trainer.serving.recommendation_service import Recommendations, RecommendationService
from trainer.serving.session_request import HINT, SessionRequest

HOST = "127.0.0.1"
"""Loopback only: the server has no authentication."""
NAMES = ("127.0.0.1", "localhost")
"""Accepted `Host` names; other names may be DNS rebinding by another site."""
MAX_BYTES = 16 << 20
LATEST = 10_000
"""Number of latest requests for the latency quantiles."""
FOUND_ITEMS = 30
DEFAULT_K = 10

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Handlers of one recommender; requests are computed one at a time in a worker thread."""

    def __init__(self, recommender: RecommendationService) -> None:
        self.recommender = recommender
        self.milliseconds: deque[float] = deque(maxlen=LATEST)
        self.requests = 0
        self.worker = ThreadPoolExecutor(1)
        self.page = files("trainer.serving").joinpath("page.html").read_text()

    def app(self) -> web.Application:
        """The application with its routes."""
        app = web.Application(client_max_size=MAX_BYTES, middlewares=[plain_errors, only_this_machine])
        app.router.add_get("/", self.index)
        app.router.add_get("/about", self.about)
        app.router.add_get("/items", self.items)
        app.router.add_post("/recommend", self.recommend)
        return app

    async def index(self, request: web.Request) -> web.Response:
        """The demo page."""
        del request
        return web.Response(text=self.page, content_type="text/html")

    async def about(self, request: web.Request) -> web.Response:
        """Model, sizes, and latency of recent requests."""
        del request
        recommender, latest = self.recommender, list(self.milliseconds)
        p50, p99 = np.quantile(latest, (0.5, 0.99)).round(3).tolist() if latest else (None, None)
        about = {
            "model": recommender.name,
            "items": len(recommender.evaluation.index.catalogue.item),
            "tasks": recommender.tasks,
            "actions": recommender.actions,
            "sources": recommender.blend.learned.names if recommender.blend else ["model"],
            "largest_k": recommender.max_k,
            "index": recommender.evaluation.index.kind,
            "requests": self.requests,
            "milliseconds": {"p50": p50, "p99": p99},
        }
        return web.json_response(about)

    async def items(self, request: web.Request) -> web.Response:
        """`?q=TEXT`: the most clicked items whose title or id contains the text."""
        found = await self._compute(self.recommender.find, request.query.get("q", ""), FOUND_ITEMS)
        return web.json_response([{"item_id": i, "title": self.recommender.title(i)} for i in found])

    async def recommend(self, request: web.Request) -> web.Response:
        """`{"sessions": [{"items": [RAW_ID, …]}, …], "k": 10}` → the next items of each session."""
        if request.content_type != "application/json":
            raise InputError("content type application/json", request.content_type, HINT)
        try:
            body = json.loads(await request.text())
        except (ValueError, LookupError, RecursionError):  # LookupError: an unknown charset
            raise InputError("JSON", "something else", HINT) from None
        if not isinstance(body, dict) or set(body) - {"sessions", "k"} or not isinstance(body.get("sessions"), list):
            raise InputError("an object with sessions and perhaps k", "another one", HINT)
        k = body.get("k", min(DEFAULT_K, self.recommender.max_k))
        if type(k) is not int:
            raise InputError("k as an integer", k, HINT)
        sessions = [SessionRequest.parse(session) for session in body["sessions"]]
        begin = perf_counter()
        recommendations = await self._compute(self.recommender.recommend, sessions, k)
        milliseconds = 1e3 * (perf_counter() - begin)
        self.milliseconds.append(milliseconds)
        self.requests += 1
        answers = answers_of(recommendations, self.recommender)
        return web.json_response({"recommendations": answers, "milliseconds": round(milliseconds, 3)})

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, lambda: function(*arguments))


def answers_of(recommendations: Recommendations, recommender: RecommendationService) -> list[dict[str, Any]]:
    """Recommendations as JSON, one dictionary per session."""
    answers = []
    for row, (items, scores) in enumerate(zip(recommendations.items, recommendations.scores, strict=True)):
        listed = np.flatnonzero(items)
        raw = recommender.evaluation.item_id[items[listed]].tolist()
        popular = bool(recommendations.popular[row])
        answer: dict[str, Any] = {
            "item_ids": raw,
            "items": items[listed].tolist(),
            "titles": [recommender.title(item) for item in raw],
            "scores": scores[listed].astype(float).tolist(),
            "ranked_by": "popularity" if popular else "blend" if recommender.blend else "model",
            "unknown_item_ids": recommendations.unknown[row],
        }
        if not popular:
            answer["probabilities"] = {
                t: p[row, listed].astype(float).tolist() for t, p in recommendations.probabilities.items()
            }
            answer["source_ranks"] = {
                name: [None if np.isnan(rank) else int(rank) for rank in ranks[row, listed]]
                for name, ranks in recommendations.source_ranks.items()
            }
        answers.append(answer)
    return answers


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer invalid requests with status 400 and one line of JSON."""
    try:
        return await handler(request)
    except InputError as error:
        return web.json_response({"error": str(error)}, status=400)


@web.middleware
async def only_this_machine(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests with another `Host` name (DNS rebinding)."""
    if request.url.host not in NAMES:
        return web.json_response({"error": f"expected host {NAMES[0]}, got {request.url.host}"}, status=403)
    return await handler(request)


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        InputError: run or result cannot be opened, or the port is taken.
    """
    server = Server(RecommendationService.open(config))
    asyncio.run(_serve(server, config.port))
    latest = list(server.milliseconds)
    if latest:
        p50, p99 = np.quantile(latest, (0.5, 0.99))
        print(f"{server.requests:,} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms", file=sys.stderr, flush=True)


async def _serve(server: Server, port: int) -> None:
    import signal

    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, HOST, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise InputError(f"a free port, port={port}", error.strerror or error, "name another one, or port=0") from None
    bound = runner.addresses[0][1]
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    print(f"serving {server.recommender.name} at http://{HOST}:{bound} (Ctrl-C ends it)", flush=True)
    await ended.wait()
    await runner.cleanup()
