"""Tests of what `graphprune.search` does."""
