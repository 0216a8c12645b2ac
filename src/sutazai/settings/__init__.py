"""Settings as frozen groups (`model`), read in one place (`load`)."""
