"""Tests of what `graphprune.repair` does."""
