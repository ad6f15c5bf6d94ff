"""What users give as data: batches, loaders, callables, over one process or several."""
