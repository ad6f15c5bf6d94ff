"""Physical removal: masks in, a smaller model and a report out."""
