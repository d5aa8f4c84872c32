"""The route that hands out statistics, before an engine's client that is a stand-in."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from safetensors.torch import save

from interp_vllm import HeadStatistics
from interp_vllm.endpoint import Endpoint


class Client:
    """Three ranks of three heads, that keep rows of one completion's first prompt."""

    async def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[bytes]:
        assert method == "interp_statistics"
        if args != ("cmpl-x-0",):
            return [b""] * 3
        common = {"positions": torch.tensor([4]), "lost": torch.tensor([0])}
        return [save({**common, "first": torch.full((1, 2, 3), float(i))}) for i in range(3)]


def answer(request: str, client: Any) -> tuple[dict[str, Any], int]:
    endpoint = Endpoint()
    asyncio.run(endpoint.init_state(client, None, None))
    return asyncio.run(endpoint.answer(request))


def test_heads_of_all_ranks_in_their_order() -> None:
    content, status = answer("cmpl-x", Client())
    seen = HeadStatistics.from_json(content)
    assert status == 200
    assert seen.first[0, 0].tolist() == [0.0] * 3 + [1.0] * 3 + [2.0] * 3


def test_a_request_of_which_nothing_is_kept() -> None:
    content, status = answer("cmpl-y", Client())
    assert status == 404 and "Nothing is kept" in content["error"]
    content, status = answer("cmpl-x", None)
    assert status == 404 and "no engine" in content["error"]
