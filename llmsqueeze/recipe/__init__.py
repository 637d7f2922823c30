"""What was asked for, and what it resolves to."""
