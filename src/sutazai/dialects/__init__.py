"""
The two APIs that clients and nodes speak, and the ways between them: bytes in, bytes out.

Where client and node speak the same one, only `reading` and `usage` look at the bytes, and `load_options`
rewrites a little. Where they differ, `to_ollama` and `to_openai` translate requests, `from_ollama` and
`from_openai` the answers. Nothing here does I/O or knows an event loop; clocks are passed in.
"""
