"""Inference: an engine that decodes many requests at once, each with a state of constant size."""

from hgrn2.serve.engine import Engine
from hgrn2.serve.options import EngineOptions
from hgrn2.serve.pool import StatePool
from hgrn2.serve.requests import Continuation, Request, RequestSampling, TokenEvent
from hgrn2.serve.sessions import Session

__all__ = [
    "Continuation", "Engine", "EngineOptions", "Request", "RequestSampling", "Session", "StatePool", "TokenEvent",
]  # fmt: skip
