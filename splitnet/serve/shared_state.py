"""What several gateways share, in Valkey or Redis: records of answers, spent tokens, stored responses.

A gateway goes on without the server of the state: each operation then returns None at once, and is tried again
after `AGAIN_S`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from splitnet.limits import MINUTE_S
from splitnet.logs import write_user_message
from splitnet.serve.admission import ApiClient

TIMEOUT_S = 0.5  # Maximum time of an operation
AGAIN_S = 2.0  # Time without operations after a failure
PREFIX = "splitnet"
RECORD_S = 3600  # How long the record of an answer is kept after its last change
RESPONSE_S = 86_400  # How long a response is stored
QUOTA_S = 3600  # How long spent tokens are kept without a change

_CLAIM = """
local digest = redis.call('HGET', KEYS[1], 'digest')
if digest and digest ~= ARGV[1] then return {'other'} end
if not digest then redis.call('HSET', KEYS[1], 'digest', ARGV[1], 'seed', ARGV[2], 'created', ARGV[3]) end
redis.call('HSET', KEYS[1], 'writer', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
local values = redis.call('HMGET', KEYS[1], 'seed', 'created')
return {'claimed', values[1], values[2], redis.call('GET', KEYS[2]) or ''}
"""
_APPEND = """
local writer = redis.call('HGET', KEYS[1], 'writer')
if not writer then return 'missing' end
if writer ~= ARGV[1] then return 'moved' end
if redis.call('STRLEN', KEYS[2]) ~= tonumber(ARGV[2]) then return 'missing' end
redis.call('APPEND', KEYS[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 'kept'
"""
_RESTORE = """
local writer = redis.call('HGET', KEYS[1], 'writer')
if writer and writer ~= ARGV[4] then return 'moved' end
redis.call('HSET', KEYS[1], 'digest', ARGV[1], 'seed', ARGV[2], 'created', ARGV[3], 'writer', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('SET', KEYS[2], ARGV[6], 'EX', ARGV[5])
return 'kept'
"""
_SPEND = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local kept = redis.call('HMGET', KEYS[1], 'spent', 'at')
local spent = tonumber(ARGV[1])
if kept[1] then spent = math.max(0, kept[1] - (now - kept[2]) * ARGV[3]) end
spent = spent + ARGV[2]
redis.call('HSET', KEYS[1], 'spent', tostring(spent), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], ARGV[4])
return tostring(spent)
"""
SCRIPTS = {"claim": _CLAIM, "append": _APPEND, "restore": _RESTORE, "spend": _SPEND}


def digest_of(*parts: str | bytes) -> str:
    """A digest that names something in the state without its content."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.hexdigest()[:48]


class SharedState:
    """A connection to the server of the state. For one event loop."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._redis: Any = Redis.from_url(
            re.sub("^valkey", "redis", url),
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # one retry, because a connection of the pool may be closed
        )
        self._scripts = {name: self._redis.register_script(text) for name, text in SCRIPTS.items()}
        self._clock = clock
        self._down_until = float("-inf")
        self.failures = 0

    @property
    def is_up(self) -> bool:
        """Whether the last operation succeeded."""
        return self._down_until == float("-inf")

    async def run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """The result of one of `SCRIPTS`; None: the server of the state does not answer."""
        return await self._tried(lambda: self._scripts[script](list(keys), list(arguments)))

    async def share_spending(self, client: ApiClient) -> None:
        """Tells how many tokens a client has spent here, and corrects its bucket to what it has spent everywhere."""
        bucket, per_minute = client.bucket, client.tokens_per_minute
        if per_minute is None:
            return
        told, bucket.unshared = bucket.unshared, 0.0
        known = max(0.0, bucket.still_spent(per_minute, client.clock()) - told)
        spent = await self.run(
            "spend", [f"{PREFIX}:spent:{client.shared_name}"], [known, told, per_minute / MINUTE_S, QUOTA_S]
        )
        if spent is None:
            bucket.unshared += told
        else:
            bucket.correct(float(spent) + bucket.unshared, client.clock())

    async def store(self, key: str, value: bytes) -> None:
        await self._tried(lambda: self._redis.set(f"{PREFIX}:{key}", value, ex=RESPONSE_S))

    async def stored(self, key: str) -> bytes | None:
        """The stored value, empty if there is none; None: the server of the state does not answer."""

        async def found() -> bytes:
            return await self._redis.get(f"{PREFIX}:{key}") or b""

        return await self._tried(found)

    async def drop(self, key: str) -> None:
        await self._tried(lambda: self._redis.delete(f"{PREFIX}:{key}"))

    async def check(self) -> bool:
        """Whether the server of the state answers."""
        await self._tried(self._redis.ping)
        return self.is_up

    async def close(self) -> None:
        await self._redis.aclose()

    async def _tried(self, operation: Callable[[], Any]) -> Any:
        from redis.exceptions import RedisError

        if self._clock() < self._down_until:
            return None
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                result = await operation()
        except (RedisError, OSError, TimeoutError) as error:
            if self.is_up:
                told = "the state is not reachable, so this gateway goes on alone until it is"
                write_user_message(logging.WARNING, f"{told} ({type(error).__name__})")
            self.failures += 1
            self._down_until = self._clock() + AGAIN_S
            return None
        if not self.is_up:
            self._down_until = float("-inf")
            write_user_message(logging.WARNING, "the state is reachable again")
        return result
