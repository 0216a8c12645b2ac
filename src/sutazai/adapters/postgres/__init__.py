"""PostgreSQL: keys and usage, over asyncpg; and a server of our own where no database was named."""
