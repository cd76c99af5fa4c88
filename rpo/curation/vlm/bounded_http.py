"""Requests that end: with a deadline over each whole one, a bound on what comes back, and no way to another place.

A client's own timeout bounds the silence between two bytes, so that a server that drips is never given up. Here the
clock runs over the whole exchange: connecting, sending, the headers, and the last byte of the body. The key is taken
out of what a server sends before anything else sees it, so that an echo of it reaches no message, file or traceback.
"""

import asyncio
import re

import httpx2
import openai

from rpo.files.local_paths import without_userinfo

BODY_LIMIT = 4 * 2**20
"""Bytes of a response; an answer has a few thousand."""

KEY_SHOWN = "[key]"
"""What stands where a server repeated the key."""

_SHORTEST_SECRET = 6  # "none", "EMPTY" and the like are no secrets, and may be words of an answer


class OversizedError(openai.OpenAIError):
    """A body longer than `BODY_LIMIT`; `beginning` is what was read of it."""

    def __init__(self, beginning: bytes) -> None:
        """Keep what was read."""
        super().__init__(f"the server sent more than {BODY_LIMIT} bytes")
        self.beginning = beginning.decode("utf-8", errors="replace")


class RefusedError(openai.OpenAIError):
    """The server wants something of the client that is not done, whatever is asked."""


class BoundedTransport(httpx2.AsyncBaseTransport):
    """Sends by a client of its own, which finds proxies and certificates, and gives back responses that are whole."""

    def __init__(self, *, seconds: float, key: str) -> None:
        """Bound each try of a request."""
        self._client = httpx2.AsyncClient(
            timeout=seconds, follow_redirects=False, limits=httpx2.Limits(max_connections=None)
        )
        self._seconds = seconds
        self._key = secret_pattern(key)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The response to a request, with all of its body."""
        request.headers["Accept-Encoding"] = "identity"  # a small body may unfold to a huge one
        try:
            async with asyncio.timeout(self._seconds):
                response = await self._client.send(request, stream=True)
                try:
                    body = await self._body(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole answer within {self._seconds:g} seconds") from error
        headers = [
            (name, self._key.sub(KEY_SHOWN, value))
            for name, value in response.headers.multi_items()
            if name not in ("content-length", "transfer-encoding")
        ]
        return httpx2.Response(response.status_code, headers=headers, content=body)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _body(self, response: httpx2.Response) -> bytes:
        if response.is_redirect:
            place = self._key.sub(KEY_SHOWN, response.headers.get("location", ""))
            raise RefusedError(
                f"it redirects to {without_userinfo(place)[:200]!r}, and nothing is sent on: if that is the server, "
                "give its address as base_url"
            )
        if (encoding := response.headers.get("content-encoding", "identity").lower()) != "identity":
            raise RefusedError(f"it sends a body compressed by {encoding[:50]!r}, and was asked for a plain one")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > BODY_LIMIT:
                raise OversizedError(self._without_key(bytes(body[:BODY_LIMIT])))
        return self._without_key(bytes(body))

    def _without_key(self, body: bytes) -> bytes:
        return self._key.sub(KEY_SHOWN, body.decode("latin-1")).encode("latin-1")  # byte by byte, whatever it holds


def secret_pattern(key: str) -> re.Pattern[str]:
    r"""What matches a key as it is, and with characters escaped as in JSON (\u0073) or in an address (%73).

    Args:
        key: Of a server; a short one is no secret and is matched by nothing.
    """
    if len(key) < _SHORTEST_SECRET:
        return re.compile(r"(?!)")
    return re.compile("".join(_forms_of(character) for character in key))


def _forms_of(character: str) -> str:
    plain, number = re.escape(character), ord(character)
    return rf"(?:\\?{plain}|\\u(?i:{number:04x})|%(?i:{number:02x}))"
