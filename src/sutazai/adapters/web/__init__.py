"""Requests to servers of the internet, guarded against reaching our own."""
