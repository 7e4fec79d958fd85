"""Membership-inference attacks, their statistics, and the report.

:func:`audit_model` audits a model in memory or in a folder on two lists of texts; ``dualtok audit`` does more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualtok.commands.audit.any_model import AuditResult, audit_model

__all__ = ["AuditResult", "audit_model"]


def __getattr__(name: str) -> Any:
    """Load the door for other programs when it is first used: it stands above this room, and takes torch (1 s)."""
    if name in __all__:
        from dualtok.commands.audit import any_model  # torch and transformers, which settings do without

        return getattr(any_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
