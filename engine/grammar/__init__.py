"""Structured output: which tokens may come next. All but `masks` handles integers and imports no torch."""
