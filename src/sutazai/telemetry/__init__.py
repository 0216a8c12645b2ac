"""Names of metrics and log events, and how they are kept and written."""
