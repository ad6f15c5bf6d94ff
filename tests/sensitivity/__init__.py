"""Tests of what `graphprune.sensitivity` does."""
