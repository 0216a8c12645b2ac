"""
HTTP/1.1 to nodes: connections, a pool for each address, and calls.

Our own, because a general client is the largest cost of a request path: the figures are in `docs/adr/0001-own-http.md`.
"""
