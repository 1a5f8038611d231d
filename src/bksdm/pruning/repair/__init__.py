"""A student that is better before any gradient: layers that stay take over, by least squares, what went after them."""
