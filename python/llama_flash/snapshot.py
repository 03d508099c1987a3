"""observe/snapshot.py under the name that users import."""

from .observe.snapshot import Snapshot

__all__ = ["Snapshot"]
