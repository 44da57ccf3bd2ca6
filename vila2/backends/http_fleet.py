"""Several servers of one model as one: who gets the next request, what is asked again, and when there is no use.

All state belongs to one event loop. A request waits in line for a server with room; a server has room up to its
adaptive limit, unless it asked for patience (Retry-After) or tripped its breaker: then one probe at a time, at growing
intervals, until an answer comes. A request is blamed for its failures only while few requests fail: when many do,
the servers are at fault, and every request waits until one answers or patience ends.
"""

import asyncio
import random
import ssl
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import httpx

from vila2.backends.http_limit import AdaptiveLimit
from vila2.backends.http_transport import find_proxy, open_transport
from vila2.backends.http_wire import (
    ChatReply,
    ExchangeError,
    Secret,
    Trouble,
    below,
    login,
    parse_base_url,
    parse_reply,
    request,
    shown,
)
from vila2.errors import VilaError

TRIP_AFTER = 5  # failures in a row that open a server's breaker; a refused connection does so at once
MANY = 8  # distinct requests failing without an answer in between: not their fault
MAX_IN_FLIGHT = 256
KEEPALIVE_S = 20.0  # servers commonly keep an idle connection longer
LONGEST_WAIT_S = 30.0  # between two attempts of our own choice; a Retry-After may be longer
MAX_HOMES = 1024
_USER_AGENT = "vila2-fast"


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Where and whom to ask. Each URL is a server's base (".../v1") or the full path of its chat completions.

    `patience_s` is how long everything may fail before the run is given up; `attempts` how often one request may,
    while others are answered.
    """

    urls: tuple[str, ...]
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 300.0
    patience_s: float = 120.0
    attempts: int = 4
    first_wait_s: float = 0.5
    max_in_flight: int = MAX_IN_FLIGHT

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("at least one URL is needed")
        if self.attempts < 1 or self.max_in_flight < 1:
            raise ValueError("attempts and max_in_flight must be at least 1")


class RequestFailed(Exception):
    """This one request got no answer, and it is to blame. `refused`: the server said so, asking again is no use."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class Server:
    """One base URL: its limit, its breaker, its pauses. Times are the event loop's."""

    def __init__(self, url: httpx.URL, settings: ChatSettings) -> None:
        self.url, self.name = url, shown(url)
        self.limit = AdaptiveLimit(settings.max_in_flight)
        self.in_flight = 0
        self.num_answers = 0
        self._first_wait_s = settings.first_wait_s
        self._failures = 0  # in a row
        self._setbacks = 0  # in a row, those that happened together counted once
        self.resumes_at = 0.0

    def start_at(self, parallel: int) -> None:
        """Begin with this many requests at once: so many fill it, it says."""
        self.limit = AdaptiveLimit(self.limit.maximum, parallel)

    @property
    def tripped(self) -> bool:
        return self._failures >= TRIP_AFTER

    def room(self, now: float) -> int:
        """How many more requests it may get now."""
        if now < self.resumes_at:
            return 0
        return (1 if self.tripped else self.limit.value) - self.in_flight

    @property
    def load(self) -> float:
        return self.in_flight / self.limit.value

    def succeeded(self, ticket: int, latency_s: float) -> None:
        self.num_answers += 1
        self.limit.succeeded(ticket, latency_s)
        self.is_alive()

    def is_alive(self) -> None:
        """It answered, whatever it said. A pause that it asked for goes on."""
        if self.tripped:
            self.resumes_at = 0.0
        self._failures = self._setbacks = 0

    def failed(self, ticket: int, error: ExchangeError, now: float) -> None:
        """Busy, down or at fault: fewer requests at once, and none for a while if it is serious."""
        is_news = self.limit.overloaded(ticket)
        was_tripped = self.tripped
        if error.trouble is Trouble.DOWN:
            self._failures = max(self._failures, TRIP_AFTER)
        elif error.trouble is Trouble.FAULT:
            self._failures += 1
        self._setbacks += is_news
        wait = error.retry_after_s
        if wait is None and (error.trouble is Trouble.BUSY or self.tripped):
            if not is_news and was_tripped == self.tripped:
                return  # it waits already
            wait = backoff(self._first_wait_s, self._setbacks)
        if wait is not None:
            self.resumes_at = max(self.resumes_at, now + wait)


@dataclass(frozen=True, slots=True)
class _Route:
    """How a server's chat completions are asked for."""

    transport: httpx.AsyncBaseTransport
    url: httpx.URL
    headers: dict[str, str]


@dataclass(slots=True, eq=False)
class _Waiter:
    future: "asyncio.Future[Server]"
    home: Hashable
    avoids: Server | None  # the one that failed it last


class Fleet:
    """Asks. Everything but the constructor runs in the event loop."""

    def __init__(self, settings: ChatSettings) -> None:
        self.settings = settings
        self.secret = Secret(settings.key_variable)
        urls = dict.fromkeys(parse_base_url(url) for url in settings.urls)
        self.servers = [Server(url, settings) for url in urls]
        self.in_flight = 0
        self.num_requests = self.num_retries = self.num_busy = self.num_faults = 0
        self.server_s = 0.0
        self._transports: dict[str | None, httpx.AsyncBaseTransport] = {}
        self._routes: dict[Server, _Route] = {}
        self._waiting: deque[_Waiter] = deque()
        self._wake: asyncio.TimerHandle | None = None
        self._homes: dict[
            Hashable, Server
        ] = {}  # of images: their other prompts find their prefix cached there
        self._next_number = 0
        self._failing: set[int] = set()  # requests at fault since the last answer
        self._failing_since: float | None = None
        self._last_message = ""
        self._num_refused = 0
        self._over: VilaError | None = None

    @property
    def room(self) -> int:
        """How many requests may be in flight now, of all servers that are not tripped."""
        limits = sum(server.limit.value for server in self.servers if not server.tripped)
        return min(self.settings.max_in_flight, limits)

    @property
    def latency_s(self) -> float:
        """What an answer took in the mean; 0 before the first."""
        answers = sum(server.num_answers for server in self.servers)
        return self.server_s / answers if answers else 0.0

    async def ask(self, body: bytes, home: Hashable = None) -> ChatReply:
        """Post one chat completion until it is answered.

        Requests of one `home` go to one server where it has room. Raises RequestFailed, or VilaError when no
        request has a chance.
        """
        number = self._next_number
        self._next_number += 1
        attempts = 0
        avoids: Server | None = None
        while True:
            server = await self._acquire(home, avoids)
            try:
                reply = await self._exchange(server, body)
            except ExchangeError as error:
                self._note(number, server, error)
                if error.trouble is Trouble.REFUSED:
                    raise RequestFailed(str(error), refused=True) from None
                attempts += error.trouble is Trouble.FAULT
                if attempts >= self.settings.attempts and len(self._failing) < MANY:
                    message = f"no answer in {attempts} attempts, the last: {error}"
                    raise RequestFailed(message, refused=False) from None
                avoids = server
            else:
                return reply
            finally:
                self._release(server)
            self.num_retries += 1
            if attempts:
                await asyncio.sleep(backoff(self.settings.first_wait_s, attempts))

    async def get(self, server: Server, path: str) -> bytes:
        """A GET below the server's base, once. Raises ExchangeError."""
        timeout_s = min(30.0, self.settings.timeout_s)
        url, headers = below(server.url, path), self._headers(server)
        return await request(self._open(server), "GET", url, headers, None, timeout_s, self.secret)

    async def close(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        for transport in self._transports.values():
            await transport.aclose()

    def _headers(self, server: Server) -> dict[str, str]:
        # httpx unpacks what comes: it must not be asked for in a way that only aiohttp knows.
        basic = {"user-agent": _USER_AGENT, "accept": "application/json", "accept-encoding": "gzip, deflate"}
        return {**basic, **self.secret.headers, **login(server.url)}

    def _open(self, server: Server) -> httpx.AsyncBaseTransport:
        """What carries a server's requests; those without a proxy share one."""
        proxy = find_proxy(server.url)
        if proxy not in self._transports:
            self._transports[proxy] = open_transport(proxy, _tls(), KEEPALIVE_S)
        return self._transports[proxy]

    async def _exchange(self, server: Server, body: bytes) -> ChatReply:
        """One attempt at one server, its outcome noted with the server."""
        now = asyncio.get_running_loop().time
        ticket, start = server.limit.begin(server.in_flight), now()
        self.num_requests += 1
        if server not in self._routes:
            headers = {**self._headers(server), "content-type": "application/json"}
            self._routes[server] = _Route(self._open(server), below(server.url, "chat/completions"), headers)
        route = self._routes[server]
        try:
            content = await request(
                route.transport,
                "POST",
                route.url,
                route.headers,
                body,
                self.settings.timeout_s,
                self.secret,
            )
            reply = parse_reply(content, self.secret)
        except ExchangeError as error:
            if (
                error.trouble is Trouble.FATAL and server.num_answers
            ):  # it did for others: a restart, or a proxy
                error.trouble = Trouble.FAULT
            if error.trouble is Trouble.REFUSED:
                server.is_alive()
            else:
                server.failed(ticket, error, now())
            raise
        self.server_s += now() - start
        server.succeeded(ticket, now() - start)
        self._failing.clear()
        self._failing_since = None
        return reply

    def _note(self, number: int, server: Server, error: ExchangeError) -> None:
        """What a failure means for everybody."""
        self._last_message = f"{server.name}: {error}"
        if error.trouble is Trouble.FATAL:
            self._stop(VilaError(self._last_message))
        elif error.trouble is Trouble.REFUSED:
            self._num_refused += 1
            if self._num_refused >= MANY and not any(one.num_answers for one in self.servers):
                self._stop(VilaError(f"every request is refused, the last by {self._last_message}"))
            return
        self.num_busy += error.trouble is Trouble.BUSY
        self.num_faults += error.trouble in (Trouble.DOWN, Trouble.FAULT)
        if error.trouble is Trouble.FAULT:
            self._failing.add(number)
        if self._failing_since is None:
            self._failing_since = asyncio.get_running_loop().time()

    def _stop(self, error: VilaError) -> None:
        """No request has a chance: all that wait, and all that come, get this error."""
        self._over = self._over or error
        for waiter in self._waiting:
            if not waiter.future.done():
                waiter.future.set_exception(self._over)
        self._waiting.clear()

    def _check_gone(self, now: float) -> None:
        """Stop if nothing is under way any more, and everything has failed for longer than patience lasts."""
        if self._failing_since is None or self.in_flight:
            return
        resumes_at = min(server.resumes_at for server in self.servers)
        if max(now, resumes_at) - self._failing_since > self.settings.patience_s:
            count = f"none of {len(self.servers)} servers answers" if len(self.servers) > 1 else "no answer"
            since = now - self._failing_since
            self._stop(VilaError(f"{count} since {since:.0f} s, the last: {self._last_message}"))

    # ---- who is next ----

    async def _acquire(self, home: Hashable, avoids: Server | None) -> Server:
        """Wait in line for a server with room, and take a place there."""
        if self._over is not None:
            raise self._over
        waiter = _Waiter(asyncio.get_running_loop().create_future(), home, avoids)
        self._waiting.append(waiter)
        self._dispatch()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                self._release(waiter.future.result())  # cancelled in the moment between the place and its use
            raise

    def _release(self, server: Server) -> None:
        server.in_flight -= 1
        self.in_flight -= 1
        self._check_gone(asyncio.get_running_loop().time())
        self._dispatch()

    def _dispatch(self) -> None:
        """Give places to those in line while there are any; else come back when a pause ends."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting and self.in_flight < self.settings.max_in_flight:
            free = [server for server in self.servers if server.room(now) > 0]
            if not free:
                break
            server = min(free, key=lambda one: (one.tripped, one.load))
            waiter = self._next_for(server)
            self._waiting.remove(waiter)
            if not waiter.future.done():
                server.in_flight += 1
                self.in_flight += 1
                waiter.future.set_result(server)
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        pauses = [server.resumes_at for server in self.servers if server.resumes_at > now]
        if self._waiting and pauses:
            self._wake = loop.call_at(min(pauses), self._dispatch)

    def _next_for(self, server: Server) -> _Waiter:
        """The first in line, but rather one at home there, and last one that this server failed just now."""

        def is_stranger(waiter: _Waiter) -> bool:
            home = self._homes.get(waiter.home)
            return home is not None and home is not server and not home.tripped

        waiter = min(self._waiting, key=lambda one: (one.avoids is server, is_stranger(one)))
        if waiter.home is not None and not is_stranger(waiter):
            self._homes[waiter.home] = server
            if len(self._homes) > MAX_HOMES:
                del self._homes[next(iter(self._homes))]
        return waiter


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """httpx's own TLS settings, made once a process: reading the certificates takes a while."""
    return httpx.create_ssl_context()


def backoff(first_s: float, times: int) -> float:
    """Seconds to wait after the `times`-th set-back in a row: doubled each time, and never the same for two."""
    return min(LONGEST_WAIT_S, first_s * 2.0 ** (min(times, 30) - 1)) * random.uniform(0.5, 1.5)
