"""Processes of our own on this machine."""
