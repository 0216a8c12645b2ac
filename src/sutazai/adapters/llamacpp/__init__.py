"""llama.cpp inside `sutazai up`: what to serve, the process that serves it, and who keeps it alive."""
