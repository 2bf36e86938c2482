"""The settings file, and the choice of tools that a request asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_gptoss.errors import GptOssError
from mlx_gptoss.server.errors import ApiError
from mlx_gptoss.server.hosted.selection import hosted_tools_of, url_has_prefix
from mlx_gptoss.server.hosted.settings import (
    BrowserSettings,
    HostedSettings,
    McpServer,
    McpSettings,
    PythonSettings,
    load_settings,
)

EXAMPLE = """
max_tool_calls = 10

[browser]
search = "brave"
key_env = "MY_KEY"
timeout_s = 5
allow_addresses = ["10.0.0.0/8"]

[python]
sandbox = "bubblewrap"
memory_mb = 512

[mcp]
allow_urls = ["https://mcp.example.com/"]

[mcp.servers.files]
command = "npx"
args = ["-y", "server"]
env = { ROOT = "/srv" }

[mcp.servers.docs]
url = "https://docs.example.com/mcp"
headers = { Authorization = "Bearer x" }
"""


@pytest.fixture
def load(tmp_path):
    def of(text, names="browser,python,mcp"):
        path = tmp_path / "tools.toml"
        path.write_text(text)
        return load_settings(names.split(","), path)

    return of


def test_a_file(load, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    settings = load(EXAMPLE)
    assert settings.max_tool_calls == 10
    assert settings.browser == BrowserSettings(
        "brave", key="secret", key_env="MY_KEY", timeout_s=5, allow_addresses=("10.0.0.0/8",)
    )
    assert settings.python == PythonSettings("bubblewrap", memory_mb=512)
    assert settings.mcp == McpSettings(
        {
            "files": McpServer("files", "npx", ("-y", "server"), {"ROOT": "/srv"}),
            "docs": McpServer("docs", url="https://docs.example.com/mcp", headers={"Authorization": "Bearer x"}),
        },
        ("https://mcp.example.com/",),
    )


def test_only_what_is_named_is_on(load, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    settings = load(EXAMPLE, "python")
    assert settings.browser is None and settings.mcp is None and settings.python is not None
    assert load_settings([]) is None
    assert load_settings(["python"]) == HostedSettings(python=PythonSettings())


@pytest.mark.parametrize(
    ("text", "names", "error"),
    [
        ("", "browse", "there is no tool 'browse'"),
        ("", "browser", "needs a search engine"),
        ("[browser]\nsearch = 'bing'", "browser", "'bing'; choose from searxng, exa, brave"),
        ("[browser]\nsearch = 'brave'", "browser", "brave needs a key: set key, or the variable BRAVE_API_KEY"),
        ("[browser]\nsearch = 'exa'\nkey_env = 'NOT_SET'", "browser", "exa needs a key: .* NOT_SET"),
        ("[browser]\nsearch = 'searxng'", "browser", "searxng needs its address"),
        ("[browser]\nsearch = 'searxng'\nurl = 'localhost'", "browser", "must begin with http"),
        ("[browser]\nsearch = 'searxng'\nurl = 'http://a'\nallow_addresses = ['x']", "browser", "allow_addresses: 'x'"),
        ("[browser]\nsearch = 'searxng'\nurl = 'http://a'\ntopn = 3", "browser", "unknown entry 'topn'"),
        ("[python]\nmemory_mb = '1'", "python", "memory_mb is '1'; it must be a whole number"),
        ("[python]\ntimeout_s = 0", "python", "timeout_s is 0; it must be a number above 0"),
        ("[python]\nmemory_mb = true", "python", "must be a whole number"),
        ("[python]\nsandbox = 'docker'", "python", "choose from auto, bubblewrap"),
        ("[mcp]", "mcp", "needs servers"),
        ("[mcp.servers.a]", "mcp", "mcp.servers.a: give either a command or a url"),
        ("[mcp.servers.a]\ncommand = 'x'\nurl = 'http://x'", "mcp", "either a command or a url"),
        ("[mcp.servers.a]\nurl = 'file:///x'", "mcp", "must begin with http"),
        ("[mcp.servers.a]\ncommand = 'x'\nargs = 'y'", "mcp", "args must be a list of strings"),
        ("[mcp.servers.a]\ncommand = 'x'\nenv = {A = 1}", "mcp", "env must be a table of strings"),
        ("[mcp]\nallow_urls = ['*']", "mcp", "allow_urls has '\\*'"),
        ("mcp = 3", "mcp", "mcp must be a table"),
        ("[tools]", "python", "unknown entry 'tools'"),
        ("max_tool_calls = -1", "python", "max_tool_calls is -1"),
        ("= nonsense", "python", "cannot read"),
    ],
)
def test_errors_say_what_is_wrong(load, text, names, error, monkeypatch):
    for name in ("BRAVE_API_KEY", "EXA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GptOssError, match=error):
        load(text, names)


def test_a_missing_file(tmp_path):
    with pytest.raises(GptOssError, match=r"cannot read .*none\.toml"):
        load_settings(["python"], tmp_path / "none.toml")


ALL = HostedSettings(
    BrowserSettings("searxng", url="http://s"),
    PythonSettings(),
    McpSettings({"files": McpServer("files", "npx")}, ("https://mcp.example.com/team/", "http://127.0.0.1:9/mcp")),
)


def test_a_request_of_everything():
    function = {"type": "function", "name": "f", "parameters": {}}
    custom = {"type": "custom", "name": "patch"}
    selection = hosted_tools_of(
        [
            {"type": "web_search_preview", "search_context_size": "low"},
            function,
            {"type": "web_search"},
            {"type": "code_interpreter", "container": "cntr_1"},
            {"type": "mcp", "server_label": "files"},
            {
                "type": "mcp",
                "server_label": "web",
                "server_url": "https://mcp.example.com/team/a?x=1",
                "headers": {"X-Key": "k"},
                "authorization": "token",
                "allowed_tools": {"tool_names": ["a"]},
                "require_approval": {"never": {"tool_names": ["a"]}, "always": {"tool_names": ["b"]}},
            },
            {"type": "image_generation"},
            {"type": "local_shell"},
            custom,
        ],
        ALL,
    )
    assert selection.builtin == ("browser", "python") and selection.container == "cntr_1"
    files, web = selection.mcp
    assert files.server is ALL.mcp.servers["files"] and files.allowed is None and files.must_approve("anything")
    assert dict(web.server.headers) == {"X-Key": "k", "Authorization": "Bearer token"}
    assert web.allowed == {"a"} and not web.must_approve("a") and web.must_approve("b") and web.must_approve("c")
    assert selection.client_tools == (function, custom)
    assert selection.left_out == ("tools[].image_generation", "tools[].local_shell")


def test_what_is_off_is_left_out():
    tools = [{"type": "web_search"}, {"type": "code_interpreter"}, {"type": "mcp", "server_label": "x"}]
    for settings in (None, HostedSettings()):
        selection = hosted_tools_of(tools, settings)
        assert not selection
        assert selection.left_out == ("tools[].web_search", "tools[].code_interpreter", "tools[].mcp")


def test_a_function_takes_the_place_of_a_builtin_tool():
    tools = [{"type": "code_interpreter"}, {"type": "web_search"}, {"type": "function", "function": {"name": "python"}}]
    selection = hosted_tools_of(tools, ALL)
    assert selection.builtin == ("browser",) and selection.left_out == ("tools[].python",)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"server_label": "other"}, "tools[0].server_label"),
        ({"server_label": 3}, "tools[0].server_label"),
        ({}, "tools[0].server_label"),
        ({"server_label": "x", "server_url": "https://evil.example/"}, "tools[0].server_url"),
        ({"server_label": "x", "server_url": 3}, "tools[0].server_url"),
        ({"server_label": "files", "allowed_tools": "all"}, "tools[0].allowed_tools"),
        ({"server_label": "files", "require_approval": "sometimes"}, "tools[0].require_approval"),
        (
            {"server_label": "x", "server_url": "http://127.0.0.1:9/mcp", "headers": {"A": "b\r\nC: d"}},
            "tools[0].headers",
        ),
        ({"server_label": "x", "server_url": "http://127.0.0.1:9/mcp", "headers": [1]}, "tools[0].headers"),
    ],
)
def test_wrong_mcp_tools(tool, param):
    with pytest.raises(ApiError) as caught:
        hosted_tools_of([{"type": "mcp", **tool}], ALL)
    assert caught.value.status == 400 and caught.value.param == param


def test_a_label_twice():
    with pytest.raises(ApiError, match="a second time"):
        hosted_tools_of([{"type": "mcp", "server_label": "files"}] * 2, replace(ALL))


@pytest.mark.parametrize(
    ("url", "prefix", "under"),
    [
        ("https://a.example/x/y", "https://a.example/x", True),
        ("https://a.example/x", "https://a.example/x", True),
        ("https://a.example/xy", "https://a.example/x", False),
        ("https://a.example/", "https://a.example", True),
        ("http://a.example/", "https://a.example", False),
        ("https://a.example.evil.org/", "https://a.example", False),
        ("https://a.example@evil.org/", "https://a.example", False),
        ("https://user@a.example/", "https://a.example/", False),
        ("https://a.example:444/", "https://a.example/", False),
        ("https://a.example/x/../y", "https://a.example/x/", False),
        ("https://a.example/x/%2e%2e/y", "https://a.example/x/", False),
        ("https://[bad/", "https://a.example/", False),
    ],
)
def test_prefixes_of_urls(url, prefix, under):
    assert url_has_prefix(url, prefix) is under
