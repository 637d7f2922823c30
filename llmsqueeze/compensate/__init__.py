"""Compensation: what is added to a rounded weight to take back some of its error."""
