"""Runs that are long or may be killed: atomic files, checkpoints, records, progress."""
