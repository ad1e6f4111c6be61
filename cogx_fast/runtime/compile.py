"""Compilation: the only owner of torch._dynamo and torch._inductor."""

from __future__ import annotations
