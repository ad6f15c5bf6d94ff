"""Tests of what `graphprune.cli` does."""
