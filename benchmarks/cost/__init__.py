"""What it costs: time, memory, communication; one file for a claim."""
