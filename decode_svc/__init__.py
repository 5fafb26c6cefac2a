"""The memory-bound pool: takes pages, runs continuous batching over them, sends tokens to the gateways."""
