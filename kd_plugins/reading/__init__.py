"""What a network is asked with, and what is read of it."""
