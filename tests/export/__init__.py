"""Tests of what `graphprune.export` does."""
