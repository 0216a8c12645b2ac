"""The HTTP API: the only package that answers with status codes."""
