"""The routes of the page at ``/``: its files, their headers, what needs a key, and that an installation has them."""

from __future__ import annotations

import fnmatch
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from steerlm_megatron.config.schema import ServerConfig
from steerlm_megatron.serve.page import FILES, FOLDER, POLICY, page_address, page_files
from tests.helpers.server import Server, running
from tests.unit.test_more_routes import Scorer

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in FILES.iterdir())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(api_keys=["secret"], root_path="/steerlm", scorer=Scorer()) as one:
        yield one


def get(server: Server, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return server.client.request(method, f"{server.url}{path}", headers=headers)


def address_of(name: str) -> str:
    return "/" if name == "index.html" else f"{FOLDER}{name}"


@pytest.mark.parametrize("name", NAMES)
def test_each_file_has_its_type_and_the_policy_and_needs_no_key(server: Server, name: str) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    answer = get(server, address_of(name))
    assert answer.status_code == 200 and answer.content == (FILES / name).read_bytes()
    assert answer.headers["Content-Type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"
    head = get(server, address_of(name), "HEAD")
    assert head.status_code == 200 and not head.content
    assert head.headers["Content-Length"] == str(len(answer.content))
    for known in (answer.headers["ETag"], f'"other", W/{answer.headers["ETag"]}'):
        again = get(server, address_of(name), **{"If-None-Match": known})
        assert again.status_code == 304 and not again.content
        assert again.headers["ETag"] == answer.headers["ETag"]
    assert get(server, address_of(name), **{"If-None-Match": '"other"'}).status_code == 200


def test_the_policy_allows_this_server_alone_and_nothing_inline() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert "unsafe" not in POLICY and "*" not in POLICY and "http" not in POLICY
    assert {name: rules.pop(name) for name in ("script-src", "style-src", "connect-src", "img-src")} == dict.fromkeys(
        ("script-src", "style-src", "connect-src", "img-src"), "'self'"
    )
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert set(rules.values()) == {"'none'"}
    assert set(rules) == {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}


@pytest.mark.parametrize("name", NAMES)
def test_the_files_obey_the_policy_and_name_nothing_outside(name: str) -> None:
    text = (FILES / name).read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w[^\s\"']*", text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses, "relative addresses alone; the name of SVG's elements is none that is loaded"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    if name.endswith(".html"):
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", text)
        # The page is shown below any path, so its own addresses are relative; each of them is there.
        for address in re.findall(r'(?:href|src)="([^"]+)"', text):
            assert address.startswith("page/") and address.removeprefix("page/") in NAMES
    for address in re.findall(r'from "([^"]+)"', text):
        assert address.removeprefix("./") in NAMES


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/no.js", "/page/index.html", "/page/../page.py", "/page/..%2fpage.py", "/page/%2e%2e/gate.py"]
    + ["/page/page_files/page.css", "/page//etc/passwd", "/page/page.css/", "/page/main.js%00", "/favicon.ico"],
)  # fmt: skip
def test_nothing_else_is_served(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:  # httpx resolves dots
        raw.sendall(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    assert answer.startswith("HTTP/1.1 404"), answer[:200]
    assert '"error"' in answer


def test_the_api_needs_the_key_and_other_methods_are_refused(server: Server) -> None:
    assert get(server, "/v1/models").status_code == 401
    assert get(server, "/v1/models", Authorization="Bearer secret").status_code == 200
    for path in ("/", "/page/main.js"):
        answer = get(server, path, "POST")
        assert answer.status_code == 405 and answer.json()["error"]["message"].startswith(f"POST {path}")


def test_the_page_is_below_the_path_of_a_proxy(server: Server) -> None:
    assert get(server, "/steerlm/").content == get(server, "/").content
    assert get(server, "/steerlm/page/main.js").content == get(server, "/page/main.js").content
    for method in ("GET", "HEAD"):
        answer = get(server, "/steerlm", method)
        assert (answer.status_code, answer.headers["Location"]) == (308, "/steerlm/")


def test_the_model_says_on_which_scale_is_measured(server: Server) -> None:
    (model,) = get(server, "/v1/models", Authorization="Bearer secret").json()["data"]
    assert model["scored_max_level"] == 9


def test_the_page_can_be_switched_off_and_its_place_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with running(page=False, root_path="/steerlm") as server:
        for path in ("/", "/page/main.js", "/steerlm", "/steerlm/"):
            assert get(server, path).status_code == 404, path
        assert get(server, "/v1/models").json()["data"][0]["scored_max_level"] is None
        assert "in a browser" not in caplog.text
    with running() as server:
        assert [line for line in caplog.messages if "in a browser" in line] == [
            f"to chat with it, open {server.url}/ in a browser (or run: steerlm chat {server.url})"
        ]


@pytest.mark.parametrize(
    ("root", "url", "address"),
    [
        ("", "http://127.0.0.1:8000", "http://127.0.0.1:8000/"),
        ("/steerlm/", "https://127.0.0.1:8000", "https://127.0.0.1:8000/steerlm/"),
        ("", "http://0.0.0.0:80", "http://host.example:80/"),
        ("", "http://[::]:80", "http://host.example:80/"),
        ("", "http://[::1]:80", "http://[::1]:80/"),
    ],
)
def test_the_address_is_one_that_people_can_open(
    monkeypatch: pytest.MonkeyPatch, root: str, url: str, address: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "host.example")
    assert page_address(ServerConfig(root_path=root), url) == address


def test_an_installation_has_all_files() -> None:
    said: dict[str, Any] = {}
    with mock.patch("setuptools.setup", said.update):
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    patterns = said["package_data"]["steerlm_megatron.serve"]
    assert "steerlm_megatron.serve" in said["packages"]
    for name in NAMES:
        assert any(fnmatch.fnmatch(f"{FILES.name}/{name}", pattern) for pattern in patterns), name
    assert sorted(page_files()) == NAMES, "each file is of a kind that is served"
