"""Attention mathematics on tensors: one call, its log-sum-exp and the statistics of its weights."""

from .dispatch import BackendError, attention, check_backend, explain
from .patterns import pattern_statistics, steer_pattern, visible
from .request import Mask, Received, Request, Result
from .softplus import softplus_attention
from .steer import Rule, Steer
from .streaming.listed_blocks import KeyLists, attend_listed
from .streaming.tree_search import tree_search

__all__ = [
    "BackendError",
    "KeyLists",
    "Mask",
    "Received",
    "Request",
    "Result",
    "Rule",
    "Steer",
    "attend_listed",
    "attention",
    "check_backend",
    "explain",
    "pattern_statistics",
    "steer_pattern",
    "softplus_attention",
    "tree_search",
    "visible",
]
