"""The chat page and what it needs to know. Decides the page's security headers, its cookie, and which files are part of it.

Leaves the page to the frontend folder and the JavaScript client to its own; both are served as they lie there, never copied.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from aiohttp import web

from mixtral_client.protocol import PageFacts, TemperatureLimits, TokenLimits
from mixtral_server.auth import COOKIE, COOKIE_LIFE_S
from mixtral_server.errors import RouteNotFound
from mixtral_server.routes.operation import Answer, Operation
from mixtral_server.routes.service import PublicRoute, Service
from mixtral_server.settings import Settings, shipped

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)


async def page(service: Service, request: web.Request) -> web.StreamResponse:
    """index.html; with public_page on, also the visitor's cookie."""
    response = _file(request, page_folder(service.settings) / "index.html")
    if service.settings.is_page_public and service.auth.visitor_of(request) is None:
        is_https = request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https"
        response.set_cookie(
            COOKIE, service.auth.new_cookie(), max_age=COOKIE_LIFE_S, path="/", httponly=True, samesite="Strict", secure=is_https
        )
    return response


async def page_file(service: Service, request: web.Request) -> web.StreamResponse:
    return _named_file(request, page_folder(service.settings))


async def client_file(service: Service, request: web.Request) -> web.StreamResponse:
    folder = service.settings.javascript_dir
    return _named_file(request, Path(folder) if folder else shipped("clients/javascript", "javascript"))


async def about(service: Service, request: web.Request) -> web.StreamResponse:
    """What the page offers: whether it needs a key, the model, and the limits of its settings."""
    endpoint = next(iter(service.chats or service.endpoints.values()))
    facts = PageFacts(
        public=service.settings.is_page_public,
        model=endpoint.name,
        title=endpoint.title,
        description=endpoint.description,
        max_tokens=TokenLimits(default=endpoint.default_max_tokens, max=endpoint.max_tokens),
        temperature=TemperatureLimits(default=endpoint.temperature, min=0, max=2),
        top_p=endpoint.top_p,
        top_k=endpoint.top_k,
    )
    return web.json_response(body=facts.model_dump_json().encode())


A_FILE = Answer("the file", media="*/*")
NOT_MODIFIED = Answer("the caller has it: its If-None-Match is the file's ETag")

ROUTES = (
    PublicRoute("GET", "/", page, Operation("Page", "the chat page", {200: Answer("the page", media="text/html"), 304: NOT_MODIFIED})),
    PublicRoute("GET", "/page/{file}", page_file, Operation("Page", "its files", {200: A_FILE, 304: NOT_MODIFIED})),
    PublicRoute("GET", "/client/{file}", client_file, Operation("Page", "the JavaScript client", {200: A_FILE, 304: NOT_MODIFIED})),
    PublicRoute("GET", "/v1/page", about, Operation("Page", "what the page must know", {200: Answer("its facts", PageFacts)})),
)


def page_folder(settings: Settings) -> Path:
    return Path(settings.frontend_dir) if settings.frontend_dir else shipped("frontend", "frontend")


def _named_file(request: web.Request, folder: Path) -> web.Response:
    name = request.match_info["file"]
    # One plain name of a known kind: no folder, no hidden file, no way out of this one.
    if not PLAIN_NAME.fullmatch(name) or Path(name).suffix not in CONTENT_TYPES:
        raise _not_found(request)
    return _file(request, folder / name)


def _file(request: web.Request, path: Path) -> web.Response:
    try:
        body = path.read_bytes()  # a few kilobytes, from the file cache
    except OSError as error:
        raise _not_found(request) from error
    headers = {
        "Content-Type": CONTENT_TYPES[path.suffix],
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Cache-Control": "no-cache",  # kept, but asked about each time: a page and its parts are of one version
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    }
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)


def _not_found(request: web.Request) -> RouteNotFound:
    return RouteNotFound(f"there is no {request.path[:100]} here; docs/api.md lists every route")
