"""Tests of what `graphprune.pruners` does."""
