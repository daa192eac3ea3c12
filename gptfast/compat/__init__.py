"""Other libraries' names over our ops. Nothing here acts when it is imported."""
