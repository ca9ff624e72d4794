"""What is known of every family of MM-DiTs: one entry each, facts only."""
