"""What a forward pass did: the recorder, and everything that it needs to leave the model as it was."""
