"""One table of cases per family of operator rules."""
