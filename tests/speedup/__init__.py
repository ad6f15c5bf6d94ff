"""Tests of what `graphprune.speedup` does."""
