"""Tests of what `graphprune.criteria` does."""
