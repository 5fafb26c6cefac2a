"""The `baton` command: starts and stops a fleet on this machine, looks the machine over, and manages API keys."""
