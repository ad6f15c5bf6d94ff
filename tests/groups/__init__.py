"""Tests of what `graphprune.groups.build` does."""
