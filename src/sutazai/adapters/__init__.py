"""One package a technology; none of them knows another, but that several speak HTTP through `adapters.http`."""
