"""
Decisions as pure functions: time and randomness are arguments.

What is here runs in the gateway and in a simulator alike.
"""
