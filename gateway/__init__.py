"""HTTP in, tokens out. Text exists here alone; everything below the gateway speaks token ids. Imports no torch."""
