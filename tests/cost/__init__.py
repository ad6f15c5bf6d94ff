"""Tests of what `graphprune.cost.count` does."""
