"""Nodes that run Ollama."""

from sutazai.adapters.ollama.node import OllamaNode

__all__ = ["OllamaNode"]
