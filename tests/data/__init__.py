"""Tests of what `graphprune.data.sources` does."""
