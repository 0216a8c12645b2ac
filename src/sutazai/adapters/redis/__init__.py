"""Redis: what several gateways share."""
