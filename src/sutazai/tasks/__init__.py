"""Durable work of agents: submitting, running, retrying and replaying tasks. Knows ports and policy alone."""
