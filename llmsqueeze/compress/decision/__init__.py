"""From what is asked and what was measured to a decision: what every linear becomes."""
