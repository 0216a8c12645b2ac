"""What the flows need from technologies, as protocols with more than one real implementation."""
