"""Tests of what `graphprune.trace` does."""
