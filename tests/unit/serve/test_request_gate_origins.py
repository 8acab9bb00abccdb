"""Pages of which origins use the server."""

from __future__ import annotations

import pytest

from tests.unit.serve.serving import GREEDY, Serve, Server


@pytest.mark.parametrize(
    ("origin", "keys", "origins", "may_send", "may_read"),
    [
        (None, [], [], True, False),
        ("http://10.0.0.5:8000", [], [], True, False),  # the server's own page
        ("https://own.example", [], [], True, False),  # the same through a proxy
        ("http://10.0.0.5:9000", [], [], False, False),
        ("http://localhost:5173", [], [], True, True),
        ("https://[::1]:5173", [], [], True, True),
        ("https://evil.example", [], [], False, False),
        ("http://localhost.evil.example", [], [], False, False),
        ("null", [], [], False, False),
        ("https://chat.example", [], ["https://chat.example"], True, True),
        ("https://evil.example", [], ["https://chat.example"], False, False),
        ("https://any.example", ["sk"], [], True, False),
        ("https://any.example", ["sk"], ["*"], True, True),
    ],
)
def test_only_allowed_origins_use_the_server(
    serve: Serve, origin: str | None, keys: list[str], origins: list[str], may_send: bool, may_read: bool
) -> None:
    async def does(server: Server) -> None:
        site = {"Sec-Fetch-Site": "same-origin" if origin == "https://own.example" else "cross-site"}
        headers = {"Host": "10.0.0.5:8000"} | ({} if origin is None else {"Origin": origin, **site})
        key = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        reply = await server.http.post(
            "/v1/completions", json=GREEDY | {"prompt": "Bees", "max_tokens": 1}, headers=headers | key
        )
        assert reply.status_code == (200 if may_send else 403)
        assert may_send or reply.json()["error"]["code"] == "unknown_origin"
        assert (reply.headers.get("access-control-allow-origin", "") in (origin, "*")) == may_read
        if origin is not None:  # the preflight request of a browser before it sends JSON, without a key
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-a"}
            before = await server.http.options("/v1/completions", headers=headers | asked)
            assert (before.headers.get("access-control-allow-origin") in (origin, "*")) == may_read
            assert (before.status_code == 200) == may_read

    serve(does, keys=keys, origins=origins)
