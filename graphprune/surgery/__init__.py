"""Physical removal: slicing tensors, setting attributes, rewriting the program, and the report on it."""
