"""Parameters and MACs: counted on a model, predicted for masks."""
