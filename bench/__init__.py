"""The request path, measured: a stub node, loads, the gateways beside ours, and a verdict on each target."""
