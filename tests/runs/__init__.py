"""Tests of what `graphprune.runs` does."""
