"""`make chaos`: breaks a real fleet on purpose, in a seeded order, and counts what its clients and its pages felt."""
