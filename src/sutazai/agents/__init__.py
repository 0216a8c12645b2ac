"""The registry of agents, and those that ship with SutazAI."""
