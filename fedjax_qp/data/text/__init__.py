"""Text: characters to predict, and instructions as sequences of tokens."""
