"""What training by noise stability optimization leads to, one file for a claim."""
