"""What can be known of a kernel without running it (aot.py, sass.py), for the calls that models make (shipped.py)."""
