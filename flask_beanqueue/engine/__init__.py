"""What a worker is made of, and what a request shares with it."""
