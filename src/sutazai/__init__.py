"""SutazAI: one gateway in front of a pool of local model servers."""

__version__ = "0.1.0"
