"""observe/trace.py under the name that users import."""

from .observe.trace import Recorder, Run, Trace, TracedTensor

__all__ = ["Recorder", "Run", "Trace", "TracedTensor"]
