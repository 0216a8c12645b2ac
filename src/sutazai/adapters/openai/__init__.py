"""Nodes that speak OpenAI's API: vLLM, LM Studio, llama.cpp's server and others."""

from sutazai.adapters.openai.node import OpenAINode

__all__ = ["OpenAINode"]
