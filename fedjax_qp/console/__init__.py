"""The terminal: what the user typed, tables, signals and lost output."""
