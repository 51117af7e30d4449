"""Web pages of other origins may read the answers (CORS), as far as the server admits them.

Seam       `nanollama.create_app` asks for `layer`, which is around its own gate: that one refuses
           other origins, and refusals are readable, too.
Remove     delete this file; only the server's own page can then read its answers.
Spec       https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from nanollama import LOCAL_ORIGIN

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from nanollama import ServerConfig


def layer(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """An application that tells browsers which origins may read its answers."""
    return CORSMiddleware(
        app,
        allow_origins=list(config.cors_origins),
        allow_origin_regex=LOCAL_ORIGIN,
        allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
        allow_headers=["*"],
        allow_private_network=True,  # Chrome asks before a page of the internet calls this machine
        expose_headers=["x-request-id", "request-id", "x-nanollama-ignored"],
    )
