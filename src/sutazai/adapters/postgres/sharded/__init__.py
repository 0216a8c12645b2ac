"""The stores over several databases: each call goes to the shard that has the tenant's slot."""
