"""Connections for many requests at once: httpx's requests and answers, carried by aiohttp.

httpx's own transport parses HTTP in Python and looks through all of its connections for each request: 1.2 ms of CPU
for a caption's exchange where aiohttp takes 0.2. On a machine that serves itself these are taken from the model. How
many connections there are is the fleet's business, so none is counted here.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx
from yarl import URL

_UNSET = aiohttp.ClientTimeout()
_PIECE = 1 << 16


class AiohttpTransport(httpx.AsyncBaseTransport):
    """A transport for httpx on one aiohttp session. `keepalive_s`: how long an idle connection is kept.

    What goes wrong is told in httpx's errors: no connection apart from one that broke, for a request that was
    never seen is not to blame. Neither redirects nor cookies nor proxies: those are the client's.
    """

    def __init__(self, verify: ssl.SSLContext, keepalive_s: float) -> None:
        self._verify, self._keepalive_s = verify, keepalive_s
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions.get("timeout", {})
        with _httpx_errors(request):
            response = await self._open().request(
                request.method,
                _address(request.url),
                data=request.content or None,
                headers=request.headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    sock_connect=timeout.get("connect"), sock_read=timeout.get("read")
                ),
            )
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(response, request),
            request=request,
        )

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # it belongs to the event loop that is running
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._verify, limit=0, keepalive_timeout=self._keepalive_s
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # httpx does
                timeout=_UNSET,
            )
        return self._session


class _Body(httpx.AsyncByteStream):
    """A response's body; read to its end, its connection is idle again, and closed before that, it is cut."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response, self._request = response, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors(self._request):
            async for piece in self._response.content.iter_chunked(_PIECE):
                yield piece

    async def aclose(self) -> None:
        self._response.close()


@contextmanager
def _httpx_errors(request: httpx.Request) -> Iterator[None]:
    """aiohttp's errors as httpx's."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error), request=request) from error
    except (aiohttp.ServerTimeoutError, asyncio.TimeoutError) as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except aiohttp.ClientConnectorError as error:  # the name, the port or TLS; nothing was sent
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise httpx.ReadError(str(error) or type(error).__name__, request=request) from error


def _address(url: httpx.URL) -> URL:
    """The same URL for aiohttp, which refuses a user and a password beside a header that says them."""
    return URL(str(url.copy_with(userinfo=b"") if url.userinfo else url), encoded=True)


def open_transport(proxy: str | None, verify: ssl.SSLContext, keepalive_s: float) -> httpx.AsyncBaseTransport:
    """What carries requests straight to their servers, or through the proxy at this URL: then httpx's own."""
    if proxy is None:
        return AiohttpTransport(verify, keepalive_s)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=keepalive_s)
    return httpx.AsyncHTTPTransport(verify=verify, limits=limits, proxy=proxy)


def find_proxy(url: httpx.URL) -> str | None:
    """The proxy that the environment (HTTP_PROXY, NO_PROXY and so on) puts between us and this URL, as a URL."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
