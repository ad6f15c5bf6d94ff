"""What the masked model computes, and whether a smaller model computes it."""
