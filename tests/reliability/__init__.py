"""What training may meet and survive: how often it was tried, and how often nothing was lost."""
