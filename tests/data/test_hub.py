from __future__ import annotations

import socket

import pytest

from hgrn2.data.hub import hub_reachable


@pytest.fixture
def resolved(monkeypatch):
    """Host names looked up; none exists."""
    names = []

    def getaddrinfo(host, port):
        names.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return names


def test_host_name_decides(resolved, monkeypatch):
    assert not hub_reachable()
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443/hub")
    assert not hub_reachable()
    assert resolved == ["huggingface.co", "mirror.example"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [])
    assert hub_reachable()


def test_proxies_resolve_names_themselves(resolved, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy.example"})
    assert hub_reachable()
    assert resolved == []


def test_switched_off(resolved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable()
    assert resolved == []
