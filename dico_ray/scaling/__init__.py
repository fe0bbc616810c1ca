"""What a sweep tries, and what its results say about other scales: plain Python and numpy, neither torch nor Ray."""
