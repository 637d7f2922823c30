"""The pipeline: a job, a decision, block after block; and the search and the forecast around it."""
