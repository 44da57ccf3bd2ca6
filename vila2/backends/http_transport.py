"""Connections for many requests at once: each takes one that is idle, or a new one.

httpx's own pool looks through all of its connections at the start and the end of every request: with eighty in
flight that takes longer than all the rest of a request. How many there are is the fleet's business, so none is counted.
"""

import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from types import TracebackType
from urllib.request import getproxies, proxy_bypass

import httpx


class IdleConnections(httpx.AsyncBaseTransport):
    """A transport for httpx made of transports of one connection each. `keepalive_s`: how long an idle one is kept."""

    def __init__(self, verify: ssl.SSLContext, keepalive_s: float) -> None:
        self._verify = verify
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=keepalive_s)
        self._idle: dict[tuple[str, str, int | None], list[httpx.AsyncHTTPTransport]] = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        idle = self._idle[request.url.scheme, request.url.host, request.url.port]
        # The one used last: it is the least likely to have been closed by the server meanwhile.
        one = idle.pop() if idle else httpx.AsyncHTTPTransport(verify=self._verify, limits=self._limits)
        try:
            response = await one.handle_async_request(request)
        except BaseException:
            await one.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, one, idle)
        return response

    async def aclose(self) -> None:
        for idle in self._idle.values():
            while idle:
                await idle.pop().aclose()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class _Body(httpx.AsyncByteStream):
    """A response's body; at its end the connection is idle again."""

    def __init__(
        self,
        inner: httpx.AsyncByteStream,
        one: httpx.AsyncHTTPTransport,
        idle: list[httpx.AsyncHTTPTransport],
    ) -> None:
        self._inner, self._one, self._idle = inner, one, idle

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._inner:
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
        self._idle.append(self._one)


def goes_direct(url: httpx.URL) -> bool:
    """Is there no proxy, by the environment, between us and this URL?"""
    proxies = getproxies()
    return not (proxies.get(url.scheme) or proxies.get("all")) or bool(proxy_bypass(url.host))
