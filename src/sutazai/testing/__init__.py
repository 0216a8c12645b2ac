"""Public tools for tests: model servers that are fake, but real on the wire, and tiny real ones."""

from sutazai.testing.node import FakeNode
from sutazai.testing.received import Received
from sutazai.testing.script import Answer, Fault, ToolCall

__all__ = ["Answer", "FakeNode", "Fault", "Received", "ToolCall"]
