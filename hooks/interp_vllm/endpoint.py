"""A route of vLLM's server that hands out statistics: GET /interp/statistics/ID.

vLLM loads it where it is named: ``VLLM_PLUGINS=interp``.
"""

from __future__ import annotations

import json
from typing import Any

from interp_vllm.client import ROUTE, TAKE, joined, nothing_kept


class Endpoint:
    """vLLM's `EndpointPlugin`: one route, through the engine's own client."""

    name = "interp"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.client: Any = None

    def attach_router(self, app: Any) -> None:
        """Adds the route. A completion of several prompts has an id for each: `?prompt=1`."""
        from fastapi.responses import Response

        async def statistics(request: str, prompt: int = 0) -> Any:
            content, status = await self.answer(request, prompt)
            return Response(json.dumps(content), status, media_type="application/json")

        app.add_api_route(ROUTE + "/{request}", statistics, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keeps the client of the engine, None where there is no engine."""
        self.client = engine_client

    async def answer(self, request: str, prompt: int = 0) -> tuple[dict[str, Any], int]:
        """What the route answers, and its status: a request's statistics since they were last
        taken, or 404 with a sentence."""
        if self.client is None:
            return {"error": "This server has no engine whose statistics it could hand out."}, 404
        for name in (f"{request}-{prompt}", request):  # a completion numbers its prompts
            ranks = await self.client.collective_rpc(TAKE, args=(name,))
            if ranks and all(ranks):
                return joined(ranks, request).to_json(), 200
        return {"error": nothing_kept(request)}, 404


def endpoint() -> Endpoint:
    """vLLM's entry point."""
    return Endpoint()
