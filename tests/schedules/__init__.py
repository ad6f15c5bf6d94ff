"""Tests of what `graphprune.schedules` does."""
