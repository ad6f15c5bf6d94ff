"""Tests of what `graphprune.compat` does."""
