"""The model's own arithmetic on sizes: found by running it on integers that remember where they come from."""
