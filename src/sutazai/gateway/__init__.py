"""The flow of a request: stages around the pool, the pool's membership, and the accounts of what was served."""
