"""Training that calls the user's own functions, and its state, kept bit by bit."""
