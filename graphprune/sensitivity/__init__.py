"""What each group can lose by itself, and budgets met by it."""
